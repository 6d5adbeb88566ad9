"""Loads a network from a run, a weights file, a diffusers folder or a published name."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from dit_jax import config as configs
from dit_jax.diffusion.flow import FLOW_PREDICTIONS
from dit_jax.diffusion.levels import PATHS
from dit_jax.diffusion.objectives import DDPM, OBJECTIVES, Flow, MeanFlow, Objective
from dit_jax.models import dit
from dit_jax.parallel import layout, sharding
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import waiting
from dit_jax.weights import diffusers, files, hub, published, snapshots

ITEMS = {"ema": "ema", "raw": "params"}  # `which` -> item of a checkpoint
VAE = "stabilityai/sd-vae-ft-ema"  # the paper's decoder (tables 2 and 3)
AUTHORS = {f"DiT-XL/2-{size}": f"DiT-XL-2-{size}x{size}.pt" for size in (256, 512)}  # the authors' files
HUB = tuple(f"facebook/DiT-XL-2-{size}" for size in (256, 512))  # the same networks as diffusers folders
SIT = {"SiT-XL/2-256": "SiT-XL-2-256x256.pt"}  # SiT's (arXiv 2401.08740): a file that must be fetched by hand
NAMES = (*AUTHORS, *HUB, *SIT)
# What the samples of a network depend on beside the name of its objective.
SETTINGS = {"flow": {"path": tuple(PATHS), "prediction": FLOW_PREDICTIONS}}


@dataclass(frozen=True)
class Loaded:
    """A network and its parameters.

    args: of models.dit.DiT. params: nested dict of arrays on the mesh. objective: what its output means. origin: where
    it comes from, for manifests. vae: file, folder or published name of its VAE, or "". class_names: one for each
    class, or None. config: the resolved config of its run, or None.
    """

    args: dict[str, Any]
    params: Any
    objective: Objective
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
    objective: Objective | None = None
    vae: str = ""

    @property
    def name(self) -> str:
        """What manifests call it: the name of a file or folder, or the published name."""
        return os.path.basename(self.path) if os.path.exists(self.path) else self.path


def is_run(where: str) -> bool:
    """Whether `where` is the directory of a run, not a diffusers folder."""
    return os.path.isdir(where) and not diffusers.is_folder(where)


@waiting("reading the weights")
def open_source(where: str, which: str = "ema") -> Source:
    """The Source of a .pt, .npz or .safetensors file, a diffusers folder, or one of NAMES. Raises UserError.

    which: "ema" or "raw", for a training checkpoint of the published code.
    """
    if which not in ITEMS:
        raise UserError(f"{where}: has no average {which}: dit_jax.average makes them of a run that keeps snapshots")
    if where in NAMES and not os.path.exists(where):
        if where in AUTHORS:
            path = hub.fetch_authors(AUTHORS[where])
            return Source(path, files.read(path, which), objective=DDPM(), vae=VAE)
        if where in SIT:
            path = hub.fetched_by_hand(where, SIT[where], "the README of https://github.com/willisma/SiT")
            return Source(path, files.read(path, which), objective=Flow(), vae=VAE)
        folder = hub.fetch(where, diffusers.PATTERNS, needed=diffusers.NEEDED)
        return _diffusers_source(where, folder)
    if os.path.isdir(where):
        return _diffusers_source(where, where)
    if not os.path.exists(where):
        raise UserError(f"{where}: no such file or folder: name one, or one of {', '.join(NAMES)}")
    return Source(where, files.read(where, which))


def _diffusers_source(where: str, folder: str) -> Source:
    flat, info = diffusers.read(folder)
    return Source(where, flat, objective=DDPM(info.pop("timesteps")), **info)


def parse_objective(given: str | Objective) -> Objective:
    """The objective that a text names, as in "flow" or "flow:path=gvp,prediction=noise"; or `given` itself.

    Raises UserError.
    """
    if isinstance(given, Objective):
        return given
    name, _, options = str(given).partition(":")
    if name not in OBJECTIVES:
        raise UserError(f"objective={given!r}: must be one of {', '.join(OBJECTIVES)}")
    settings, known = {}, SETTINGS.get(name, {})
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if value not in known.get(key, ()):
            has = "; ".join(f"{key} is one of {', '.join(values)}" for key, values in known.items())
            raise UserError(f"objective={given!r}: {option!r} is no option of {name}" + (f": {has}" if has else ""))
        settings[key] = value
    return OBJECTIVES[name](**settings)


def choose_objective(source: Source, args: dict[str, Any], given: str | Objective | None) -> Objective:
    """The objective of the network of a Source.

    args: of published.infer_args. given: for parse_objective; None for the Source's if it is known, else for MeanFlow
    if the network takes a second time, else for the paper's. Raises UserError naming what does not fit.
    """
    known = source.objective
    if known is not None and given not in (None, known, known.name):
        raise UserError(f"objective={given}: {source.name} is of the objective {known.name}: leave it out")
    if known is None and given is not None:
        known = parse_objective(given)
    elif known is None:
        known = MeanFlow() if args["second_time"] else DDPM()
    if known.second_time and not args["second_time"]:
        raise UserError(
            f"{source.path}: {published.SECOND_TIME} are missing, which objective={known.name} needs: name another "
            "objective, as in objective=flow, or the weights of a MeanFlow network"
        )
    if args["second_time"] and not known.second_time:
        raise UserError(
            f"{source.path}: has {published.SECOND_TIME}, of a MeanFlow network, which objective={known.name} does not "
            "use: leave the objective out"
        )
    if known.learn_sigma and not args["learn_sigma"]:
        raise UserError(
            f"{source.path}: final_layer.linear has no channels of the variance, which objective={known.name} needs: "
            "name another objective, as in objective=flow"
        )
    return known


def _described(objective, settings):
    """The objective in a manifest. settings: those that are known of it. The paper's is described by its timesteps."""
    if isinstance(objective, DDPM):
        return {"timesteps": objective.timesteps} | ({"min_snr": objective.min_snr} if objective.min_snr else {})
    return {"objective": {"name": objective.name} | {k: v for k, v in asdict(objective).items() if k in settings}}


def load(
    where: str,
    mesh: jax.sharding.Mesh,
    *,
    which: str = "ema",
    step: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    objective: str | Objective | None = None,
) -> Loaded:
    """Loads the network of a run's directory, a .pt, .npz or .safetensors file, a diffusers folder, or one of NAMES.

    which: "ema" or "raw", or of a run an average, as in "std0.1". step: which checkpoint or average of a run; None for
    the newest. num_heads, num_classes: as in published.infer_args. objective: of a file, as in choose_objective.
    Raises UserError.
    """
    if not configs.is_which(which):
        raise UserError(f"which={which!r}: must be {configs.WHICH}")
    if is_run(where):
        given = {"num_heads": num_heads, "num_classes": num_classes, "objective": objective}
        for name, value in given.items():
            if value is not None:
                raise UserError(f"{name}={value}: is for a weights file; {where} is a run, whose config names it")
        return from_run(where, mesh, which, step)
    if step is not None:
        raise UserError(f"step={step}: names a checkpoint of a run, and {where} is no run's directory")
    return from_source(open_source(where, which), mesh, which, num_heads, num_classes, objective)


def load_guide(where: str, mesh: jax.sharding.Mesh, which: str, step: int | None) -> Loaded:
    """Loads the network that guides another one. Arguments: as in load. Raises UserError naming guide or guide_step."""
    try:
        return load(where, mesh, which=which, step=step)
    except UserError as e:
        text = str(e)
        named = text.replace("--step=", "--guide_step=", 1) if text.startswith("--step=") else f"guide: {text}"
        raise UserError(named) from None


@waiting("reading the checkpoint")
def from_run(
    workdir: str,
    mesh: jax.sharding.Mesh,
    which: str = "ema",
    step: int | None = None,
    check: Callable[[dict], None] = lambda args: None,
) -> Loaded:
    """Loads the network of a run's checkpoint, or an average that dit_jax.average has made.

    which: "ema" or "raw", or the average, as in "std0.1". step: None for the newest checkpoint that can be read, or the
    newest average. check(args) is called before the parameters are read. Raises UserError.
    """
    if which not in ITEMS:
        meta, weights = snapshots.open_average(workdir, which, step)
        which = configs.average_name(configs.average_std(which))
        args = _checked_args(workdir, meta["config"], check)
        params = snapshots.to_params(weights, sharding.abstract_arrays(dit.abstract(**args)[1], mesh))
        made = meta["average"]
        average = {"of": made.get("of"), "snapshots": len(made["steps"]), "distance": made.get("distance")}
        identity = {"sha256": meta["sha256"], "average": average}
        return _loaded(workdir, args, params, meta["step"], which, identity, meta)
    from dit_jax.weights.checkpoint import Checkpoints  # orbax takes a second to import; files need none

    checkpoints = Checkpoints(workdir, read_only=True)
    args = _checked_args(workdir, checkpoints.latest_meta(step)["config"], check)
    target = sharding.abstract_arrays(dit.abstract(**args)[1], mesh)
    step, params, meta = checkpoints.restore_params(step, ITEMS[which], target)
    checkpoints.close()
    identity = {"fingerprint": meta["fingerprints"][ITEMS[which]]}
    return _loaded(workdir, args, params, step, which, identity, meta)


def _checked_args(workdir: str, config: dict[str, Any], check: Callable[[dict], None]) -> dict[str, Any]:
    """The arguments of models.dit.DiT of a run's config. Raises UserError."""
    args: dict[str, Any] = configs.dit_args(layout.resolve_auto(config, jax.devices()))
    check(args)
    try:
        layout.check_memory(layout.least_memory(args), jax.devices())
    except UserError as e:
        raise UserError(f"{workdir}: {e}") from None
    return args


def _loaded(
    workdir: str,
    args: dict[str, Any],
    params: Any,
    step: int,
    which: str,
    identity: dict[str, Any],
    meta: dict[str, Any],
) -> Loaded:
    """The Loaded of a run. identity: for the origin, what tells these parameters from others."""
    config = meta["config"]
    objective = configs.objective_of(config)
    origin = {
        "workdir": os.path.abspath(workdir),
        "step": step,
        "which": which,
        **identity,
        "data": meta["data"],
        "batch_size": config["batch_size"],
        "init": meta.get("init"),
        **_described(objective, asdict(objective)),
    }
    vae = config.get("vae", {}).get("path", "")
    return Loaded(args, params, objective, origin, vae, meta.get("class_names"), config)


@waiting("placing the weights on the devices")
def from_source(
    source: Source,
    mesh: jax.sharding.Mesh,
    which: str = "ema",
    num_heads: int | None = None,
    num_classes: int | None = None,
    objective: str | Objective | None = None,
) -> Loaded:
    """Loads the network of published arrays; its geometry is inferred from their shapes.

    num_heads, num_classes: as in published.infer_args; by default the Source's. objective: as in choose_objective.
    Raises UserError.
    """
    args = published.infer_args(source.flat, num_heads or source.num_heads, num_classes or source.num_classes)
    chosen = choose_objective(source, args, objective)
    args |= {"block": "adaln_zero", "dtype": layout.compute_dtype(jax.devices())}
    args |= {"attention": layout.choose_attention(args, jax.devices())}
    sha256 = hashlib.sha256()
    params = published.from_published(source.flat, args, sha256)
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    origin = {
        "weights": source.name,
        "sha256": sha256.hexdigest(),
        "which": which,
        **_described(chosen, SETTINGS.get(chosen.name, ())),
    }
    return Loaded(args, params, chosen, origin, source.vae, source.class_names)
