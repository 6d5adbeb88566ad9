"""What is timed together, and with what settings."""

import importlib.util
import os
from dataclasses import dataclass, field

from benchmarks.machine import cores
from benchmarks.speed import WHAT, data, page
from dit_jax import config as configs
from dit_jax.data.latents import LatentCache
from dit_jax.data.records import Folder
from dit_jax.diffusion.process import linear_schedule, respace
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say
from dit_jax.vae import files as vae_files, network
from dit_jax.vae.autoencoder import SCALE, batch_size

# What --report times: (what, model, images a call). The three training steps and the two denoising steps have targets.
REPORT = [
    ("train", "DiT-S/2", 8),
    ("train", "DiT-B/4", 8),
    ("train", "DiT-S/8", 32),
    ("denoise", "DiT-S/2", 4),
    ("denoise", "DiT-XL/2", 1),
    ("sample", "DiT-S/2", 1),
    ("decode", "DiT-S/2", 4),
    ("start", "DiT-XL/2", 1),
    ("data", "DiT-S/2", 8),
    ("evaluation", "DiT-S/2", 8),
    ("scaling", "DiT-S/2", 4),
]
# What --report --against=pytorch times, which is for a GPU.
REPORT_PYTORCH = [
    ("train", "DiT-XL/2", 32),
    ("train", "DiT-XL/2", 64),
    ("denoise", "DiT-XL/2", 1),
    ("denoise", "DiT-XL/2", 32),
]
STEPS = 10  # denoising steps that a call makes beside compiled PyTorch: a GPU is not waited for after each one
# The modules that run in processes of their own.
JAX, PYTORCH, START, DATA, EVALUATION = (
    f"benchmarks.speed.{module}" for module in ("jax_side", "pytorch_side", "start", "data", "evaluation")
)


@dataclass
class Part:
    """What is timed together.

    sides: {label: (module of the child, its spec)}, dit_jax first. warm: whether each side makes a call or two before
    the rounds. about: further fields of the record.
    """

    name: str
    what: str
    model: str
    sides: dict
    rounds: int
    warm: bool = True
    about: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How things are timed, as the flags of python -m benchmarks.speed say it.

    against: what PyTorch is timed on beside, "diffusers" or "pytorch", or empty. rounds: of timings. images: denoised
    at once. vae: a VAE's file or folder, or empty. cache, pictures: what is read, or None. num_latents: how many are
    made where `cache` is None. samples, references, width: of the features.
    """

    against: str = ""
    rounds: int = 5
    images: int = 4
    vae: str = ""
    cache: str | None = None
    pictures: str | None = None
    num_latents: int = 8192
    samples: int = 50_000
    references: int = 10_000
    width: int = 2048


def of_report(what, settings, scratch):
    """Returns the parts of REPORT, or of REPORT_PYTORCH, whose kinds are in `what`. scratch: an empty folder.

    Raises UserError.
    """
    todo = []
    for kind, model, images in REPORT_PYTORCH if settings.against == "pytorch" else REPORT:
        if kind in what:
            config = configs.paper(model)
            config.batch_size = images
            todo.append((kind, config, images))
    return _parts(todo, settings, scratch)


def of_config(what, config, settings, scratch):
    """Returns the parts of a ConfigDict, by default DiT-S/2's with a batch of 8, whose kinds are in `what`.

    scratch: an empty folder. Raises UserError.
    """
    if config is None:
        config = configs.paper("DiT-S/2")
        config.batch_size = 8
    if config.objective != "ddpm":
        raise UserError(f"objective={config.objective}: only the paper's, ddpm, is timed")
    return _parts([(kind, config, settings.images) for kind in WHAT if kind in what], settings, scratch)


def _parts(todo, settings, scratch):
    parts = []
    for kind, config, images in todo:
        if kind == "data":
            parts += data_parts(settings, scratch)
        elif kind == "evaluation":
            parts += evaluation_parts(settings)
        elif kind == "decode":
            parts += decode_parts(configs.resolve(config), settings)
        elif kind == "start":
            parts += start_parts(configs.resolve(config), settings, scratch)
        elif kind == "scaling":
            parts += scaling_parts(configs.resolve(config), settings)
        elif kind == "train":
            parts += train_parts(configs.resolve(config), settings)
        else:
            parts += denoising_parts(kind, configs.resolve(config), images, settings)
    return parts


def _beside(config, spec, settings):
    """Returns PyTorch's side of what `spec` says, as a dict of sides, which is empty where it is not asked for."""
    model, against = config["model"], settings.against
    if not against:
        return {}
    if model["block"] != "adaln_zero":
        raise UserError(f"model.block={model['block']}: --against={against} has adaln_zero alone")
    if not model["num_classes"]:
        raise UserError(f"model.num_classes=0: --against={against} has models with classes alone")
    if against == "pytorch" and spec.get("what") not in ("train", "denoise"):
        raise UserError("--against=pytorch is of --what=train,denoise,scaling: leave the others out")
    return {page.SIDES[against]: (PYTORCH, {**spec, "against": against, "threads": cores()})}


def label(config):
    """Returns the model's name. Fields that differ from the paper's are added, as targets are not meant for those."""
    name, model = config["model"]["name"], config["model"]
    if not name:
        return f"DiT {model['depth']}x{model['hidden_size']}/{model['patch_size']}"
    published = configs.resolve(configs.paper(name))
    changed = [
        f"{field.removeprefix('model.')}={value}"
        for field, _, value in configs.differences(published, config)
        if field.startswith("model.") and (field, value) != ("model.dtype", "float32")
    ]  # the targets' dtype
    return f"{name} ({', '.join(changed)})" if changed else name


def train_parts(config, settings):
    """The training step of a resolved config."""
    model, spec = label(config), {"what": "train", "config": config}
    return [
        Part(
            f"train {model}, batch {config['batch_size']}",
            "train",
            model,
            {page.JAX_SIDE: (JAX, spec), **_beside(config, spec, settings)},
            settings.rounds,
        )
    ]


def denoising_parts(what, config, images, settings):
    """One denoising step ("denoise") or a whole sampling run ("sample") of a resolved config. images: at once."""
    model, sample = label(config), config["sample"]
    if sample["cfg_scale"] == 1 or not config["model"]["num_classes"]:
        raise UserError(
            f"sample.cfg_scale={sample['cfg_scale']}, model.num_classes={config['model']['num_classes']}: "
            f"--what={what} times guided steps, which need classes and a scale that is not 1"
        )
    try:
        steps = len(respace(linear_schedule(config["diffusion"]["timesteps"]), sample["steps"]))
    except UserError as e:
        raise UserError(f"config.sample: {e}") from None
    spec = {"what": "denoise", "config": config, "images": images}
    if what == "denoise":  # a step of DDPM on both sides
        spec["config"] = config | {"sample": sample | {"sampler": "ddpm"}}
        several = settings.against == "pytorch"
        spec |= {"steps": min(steps, STEPS)} if several else {}
        return [
            Part(
                f"denoise {model}, {images} guided" + (f", {spec['steps']} steps" if several else ""),
                what,
                model,
                {page.JAX_SIDE: (JAX, spec), **_beside(config, spec, settings)},
                settings.rounds,
            )
        ]
    sides = {page.JAX_SIDE: (JAX, {**spec, "what": "sampler"}), page.BARE: (JAX, {**spec, "steps": steps})}
    return [Part(f"sample {model}, {images} guided, {steps} steps", what, model, sides, settings.rounds, warm=False)]


def scaling_parts(config, settings):
    """The training step at a quarter to twice the batch, the side in patches, and the depth, one at a time."""
    model = label(config)
    n, patch = config["batch_size"], config["model"]["patch_size"]
    grid, depth = config["model"]["input_size"] // patch, config["model"]["depth"]
    base, parts = {"batch": n, "tokens": grid**2, "depth": depth}, {}
    # First what all three lines of the plot share.
    for key, value, factors in (
        ("batch", n, (1,)),
        ("batch", n, (0.25, 0.5, 2)),
        ("tokens", grid, (0.5, 0.75, 1.5)),
        ("depth", depth, (0.25, 0.5, 2)),
    ):
        for v in sorted({max(1, round(value * factor)) for factor in factors}):
            at = base | {key: v**2 if key == "tokens" else v}
            side = patch * (v if key == "tokens" else grid)
            changed = config | {
                "batch_size": at["batch"],
                "model": config["model"] | {"depth": at["depth"], "input_size": side},
            }
            spec = {"what": "train", "config": changed}
            parts[tuple(at.values())] = Part(
                f"scaling {model}, batch {at['batch']}, {at['tokens']} tokens, {at['depth']} blocks",
                "scaling",
                model,
                {page.JAX_SIDE: (JAX, spec), **_beside(config, spec, settings)},
                min(settings.rounds, 3),
                about={"at": at, "base": base},
            )
    return list(parts.values())


def decode_parts(config, settings):
    """The VAE's decoder, on as many latents of the config's size as it takes at once."""
    path = settings.vae
    vae = vae_files.load(path) if path else None
    args, scale = (vae.args, vae.scale) if vae else (network.PUBLISHED, SCALE)
    side = config["model"]["input_size"]
    size = side * 2 ** (len(args["block_out_channels"]) - 1)
    images, which = batch_size(size), f" by {os.path.basename(os.path.normpath(path))}" if path else ""
    args = {key: args[key] for key in ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")}
    spec = {"what": "decode", "images": images, "side": side, "args": args, "scale": scale}
    return [
        Part(
            f"decode {images} of {size} px{which}",
            "decode",
            "VAE",
            {page.JAX_SIDE: (JAX, {"what": "decode", "side": side, "path": path}), **_beside(config, spec, settings)},
            settings.rounds,
        )
    ]


def start_parts(config, settings, scratch):
    """A first start, a second one, and PyTorch's. scratch: a folder for the weights."""
    spec = {"config": config, "folder": scratch, "threads": cores()}
    sides = {page.JAX_SIDE: "fresh", page.AGAIN: "again"} | dict.fromkeys(_beside(config, spec, settings), "pytorch")
    model = label(config)
    if config["model"]["block"] != "adaln_zero" or not config["model"]["num_classes"]:
        raise UserError(
            f"model.block={config['model']['block']}, model.num_classes={config['model']['num_classes']}: "
            "--what=start takes guided steps of a file of the published format, which knows adaln_zero and "
            "classes"
        )
    return [
        Part(
            f"start {model}",
            "start",
            model,
            {name: (START, {**spec, "side": side}) for name, side in sides.items()},
            settings.rounds,
            warm=False,
        )
    ]


def data_parts(settings, scratch):
    """Reading settings.cache and settings.pictures, or what is made in the folder `scratch` in their place."""
    for flag, path, source in (("cache", settings.cache, LatentCache), ("pictures", settings.pictures, Folder)):
        count = 2 * data.BATCH if path is None else len(source(path))
        if count < 2 * data.BATCH:
            raise UserError(f"--{flag}={path}: holds {count} examples, and two batches take {2 * data.BATCH}")
    say("data: making what is read")
    cache = settings.cache or os.path.join(scratch, "cache")
    folder, npy = settings.pictures or os.path.join(scratch, "pictures"), os.path.join(scratch, "npy")
    if settings.cache is None:
        data.make_cache(cache, settings.num_latents)
    if settings.pictures is None:
        data.make_pictures(folder, 4 * data.BATCH)
    torch, shape = importlib.util.find_spec("torch") is not None, LatentCache(cache).shape
    if torch:
        data.Npy.make(npy, settings.num_latents, shape)
    else:
        say("PyTorch is not installed: no DataLoader to set beside (pip install -e '.[torch]')")
    parts = []
    for kind, path, other, rows in (
        ("latents", cache, npy, 8 * settings.num_latents),  # about as long as the others take
        ("JPEG", folder, folder, 4 * data.BATCH),
    ):
        spec = {"kind": kind, "path": other, "rows": rows}
        sides = {page.JAX_SIDE: (DATA, {**spec, "path": path, "workers": None})}
        for workers in sorted({0, cores()}) if torch else ():
            sides[f"DataLoader, {workers} workers"] = DATA, {**spec, "workers": workers}
        what = f"{kind}, {'x'.join(map(str, shape))}" if kind == "latents" else kind
        parts.append(Part(f"data, {what}", "data", "", sides, settings.rounds, warm=False))
    return parts


def evaluation_parts(settings):
    """FID, and precision with recall, of features drawn at random."""
    s, parts = settings, []
    for metric, usual, n, rounds in (
        ("FID", "np.cov, scipy's sqrtm", max(s.references, s.width + 1), 3),
        ("precision, recall", "scikit-learn's neighbours", s.references, 1),
    ):
        spec = {"metric": metric, "shapes": [(s.samples, s.width), (n, s.width)]}
        sides = {name: (EVALUATION, {**spec, "usual": name == usual}) for name in (page.JAX_SIDE, usual)}
        parts.append(
            Part(
                f"{metric}, {s.samples:,d} samples" + ("" if metric == "FID" else f", {n:,d} references"),
                "evaluation",
                "",
                sides,
                min(s.rounds, rounds),
                warm=False,
            )
        )
    return parts
