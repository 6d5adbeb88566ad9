"""Loads a network from a run, a weights file, a diffusers folder or a published name."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dit_jax import config as configs
from dit_jax.models import dit
from dit_jax.parallel import layout, sharding
from dit_jax.runtime.errors import UserError
from dit_jax.weights import diffusers, files, hub, published

ITEMS = {"ema": "ema", "raw": "params"}  # `which` -> item of a checkpoint
VAE = "stabilityai/sd-vae-ft-ema"  # the paper's decoder (tables 2 and 3)
AUTHORS = {f"DiT-XL/2-{size}": f"DiT-XL-2-{size}x{size}.pt" for size in (256, 512)}  # the authors' files
HUB = tuple(f"facebook/DiT-XL-2-{size}" for size in (256, 512))  # the same networks as diffusers folders
NAMES = (*AUTHORS, *HUB)


@dataclass(frozen=True)
class Loaded:
    """A network and its parameters.

    args: of models.dit.DiT. params: nested dict of arrays on the mesh. timesteps: of its diffusion process. origin:
    where it comes from, for manifests. vae: file, folder or published name of its VAE, or "". class_names: one for each
    class, or None. config: the resolved config of its run, or None.
    """

    args: dict[str, Any]
    params: Any
    timesteps: int
    origin: dict[str, Any]
    vae: str = ""
    class_names: list[str] | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Source:
    """Published arrays, each read when it is asked for, and what is known about them.

    path: for messages. flat: {published name: float32 array}. The other fields are as in Loaded, and as in
    published.infer_args; None or "" if unknown.
    """

    path: str
    flat: Mapping[str, np.ndarray]
    num_heads: int | None = None
    num_classes: int | None = None
    class_names: list[str] | None = None
    timesteps: int = 1000
    vae: str = ""

    @property
    def name(self) -> str:
        """What manifests call it: the name of a file or folder, or the published name."""
        return os.path.basename(self.path) if os.path.exists(self.path) else self.path


def is_run(where: str) -> bool:
    """Whether `where` is the directory of a run, not a diffusers folder."""
    return os.path.isdir(where) and not diffusers.is_folder(where)


def open_source(where: str, which: str = "ema") -> Source:
    """The Source of a .pt, .npz or .safetensors file, a diffusers folder, or one of NAMES. Raises UserError.

    which: "ema" or "raw", for a training checkpoint of the published code.
    """
    if where in NAMES and not os.path.exists(where):
        if where in AUTHORS:
            path = hub.fetch_authors(AUTHORS[where])
            return Source(path, files.read(path, which), vae=VAE)
        folder = hub.fetch(where, diffusers.PATTERNS)
        return _diffusers_source(where, folder)
    if os.path.isdir(where):
        return _diffusers_source(where, where)
    if not os.path.exists(where):
        raise UserError(f"{where}: no such file or folder: name one, or one of {', '.join(NAMES)}")
    return Source(where, files.read(where, which))


def _diffusers_source(where: str, folder: str) -> Source:
    flat, info = diffusers.read(folder)
    return Source(where, flat, **info)


def load(
    where: str,
    mesh: jax.sharding.Mesh,
    *,
    which: str = "ema",
    step: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> Loaded:
    """Loads the network of a run's directory, a .pt, .npz or .safetensors file, a diffusers folder, or one of NAMES.

    which: "ema" or "raw". step: which checkpoint of a run; None for the newest. num_heads, num_classes: as in
    published.infer_args. Raises UserError.
    """
    if which not in ITEMS:
        raise UserError(f"which={which!r}: must be 'ema' or 'raw'")
    if is_run(where):
        return from_run(where, mesh, which, step)
    if step is not None:
        raise UserError(f"step={step}: names a checkpoint of a run, and {where} is no run's directory")
    return from_source(open_source(where, which), mesh, which, num_heads, num_classes)


def from_run(
    workdir: str,
    mesh: jax.sharding.Mesh,
    which: str = "ema",
    step: int | None = None,
    check: Callable[[dict], None] = lambda args: None,
) -> Loaded:
    """Loads the network of a run's checkpoint.

    which: "ema" or "raw". step: None for the newest checkpoint that can be read. check(args) is called before the
    parameters are read. Raises UserError.
    """
    from dit_jax.weights.checkpoint import Checkpoints  # orbax takes a second to import; files need none

    checkpoints = Checkpoints(workdir, read_only=True)
    config = checkpoints.latest_meta(step)["config"]
    args: dict[str, Any] = configs.dit_args(layout.resolve_auto(config, jax.devices()))
    check(args)
    try:
        layout.check_memory(layout.least_memory(args), jax.devices())
    except UserError as e:
        raise UserError(f"{workdir}: {e}") from None
    target = sharding.abstract_arrays(dit.abstract(**args)[1], mesh)
    step, params, meta = checkpoints.restore_params(step, ITEMS[which], target)
    checkpoints.close()
    timesteps = config["diffusion"]["timesteps"]
    origin = {
        "workdir": os.path.abspath(workdir),
        "step": step,
        "which": which,
        "fingerprint": meta["fingerprints"][ITEMS[which]],
        "data": meta["data"],
        "batch_size": config["batch_size"],
        "init": meta.get("init"),
        "timesteps": timesteps,
    }
    vae = config.get("vae", {}).get("path", "")
    return Loaded(args, params, timesteps, origin, vae, meta.get("class_names"), config)


def from_source(
    source: Source,
    mesh: jax.sharding.Mesh,
    which: str = "ema",
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> Loaded:
    """Loads the network of published arrays; its geometry is inferred from their shapes.

    num_heads, num_classes: as in published.infer_args; by default the Source's. Raises UserError.
    """
    args = published.infer_args(source.flat, num_heads or source.num_heads, num_classes or source.num_classes)
    args |= {"block": "adaln_zero", "dtype": layout.compute_dtype(jax.devices())}
    sha256 = hashlib.sha256()
    params = published.from_published(source.flat, args, sha256)
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    origin = {
        "weights": source.name,
        "sha256": sha256.hexdigest(),
        "which": which,
        "timesteps": source.timesteps,
    }
    return Loaded(args, params, source.timesteps, origin, source.vae, source.class_names)
