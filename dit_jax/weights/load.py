"""Where a network comes from: a run's folder, or a file of the published format."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import jax

from dit_jax import config as configs
from dit_jax.models import dit
from dit_jax.parallel import layout, sharding
from dit_jax.runtime.errors import UserError
from dit_jax.weights import files, published

ITEMS = {"ema": "ema", "raw": "params"}  # of a checkpoint, by --which


@dataclass(frozen=True)
class Loaded:
    """A network. args: of models.dit.DiT. params: on the mesh. timesteps: of its diffusion process. origin: where it comes
    from, for manifests. vae: the path of its run's VAE, or "".
    """
    args: dict
    params: Any
    timesteps: int
    origin: dict
    vae: str = ""


def from_run(workdir, mesh, which="ema", step=None, check=lambda args: None):
    """The network of a run's checkpoint -> Loaded.

    which: "ema" or "raw". step: None for the newest checkpoint that can be read. check(args) is called before the
    parameters are read. Raises UserError.
    """
    from dit_jax.weights.checkpoint import Checkpoints  # orbax takes a second to import, and files do without

    checkpoints = Checkpoints(workdir, read_only=True)
    meta = checkpoints.latest_meta(step)
    config = meta["config"]
    args = configs.dit_args(layout.resolve_auto(config, jax.devices()))
    check(args)
    try:
        layout.check_memory(layout.least_memory(args), jax.devices())
    except UserError as e:
        raise UserError(f"{workdir}: {e}") from None
    target = sharding.abstract_arrays(dit.abstract(**args)[1], mesh)
    step, params, meta = checkpoints.restore_params(step, ITEMS[which], target)
    checkpoints.close()
    return Loaded(args, params, config["diffusion"]["timesteps"], {
        "workdir": os.path.abspath(workdir), "step": step, "which": which,
        "fingerprint": meta["fingerprints"][ITEMS[which]], "data": meta["data"], "batch_size": config["batch_size"],
        "init": meta.get("init"), "timesteps": config["diffusion"]["timesteps"]}, config.get("vae", {}).get("path", ""))


def from_file(path, mesh, which="ema", num_heads=None, num_classes=None):
    """The network of a .pt or .npz file -> Loaded. Its geometry is read off the shapes.

    which: "ema" or "raw" of a training checkpoint of the published code. num_heads, num_classes: of
    published.infer_args. Raises UserError.
    """
    flat = files.read(path, which)
    args = published.infer_args(flat, num_heads, num_classes) | {
        "block": "adaln_zero", "dtype": layout.compute_dtype(jax.devices())}
    sha256 = hashlib.sha256()
    params = published.from_published(flat, args, sha256)
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    return Loaded(args, params, 1000, {
        "weights": os.path.basename(path), "sha256": sha256.hexdigest(), "which": which, "timesteps": 1000})
