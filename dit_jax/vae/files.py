"""Reads and writes files of Stable Diffusion's VAE.

The arrays have the names of today's published files (diffusers). Files with either older generation of attention names
are also read, and files in the layout of the original code (CompVis), alone or inside a Stable Diffusion checkpoint.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading, write_aside
from dit_jax.runtime.progress import waiting
from dit_jax.vae import network
from dit_jax.vae.autoencoder import SCALE, Autoencoder
from dit_jax.weights import hub, pytorch
from dit_jax.weights.files import read_all

WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_LEVELS = 8  # also the most layers of a level; the published VAEs have 4 levels of 2 layers
HUB = {  # name: (revision, sha256 of WEIGHTS there)
    "stabilityai/sd-vae-ft-ema": (
        "f04b2c4b98319346dad8c65879f680b1997b204a",
        "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
    ),
    "stabilityai/sd-vae-ft-mse": (
        "31f26fdeee1355a5c34592e401dd41e45d25a493",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
}
# Names of older generations -> today's.
RENAMES = [
    (re.compile(old), new)
    for old, new in (
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
        (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
        (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"coder\.norm_out\.", "coder.conv_norm_out."),
        (r"(attentions\.0)\.(?:query|q)\.", r"\1.to_q."),
        (r"(attentions\.0)\.(?:key|k)\.", r"\1.to_k."),
        (r"(attentions\.0)\.(?:value|v)\.", r"\1.to_v."),
        (r"(attentions\.0)\.(?:proj_attn|proj_out)\.", r"\1.to_out.0."),
    )
]
FIXED = {  # fields of a config.json -> the only value that vae/network.py has
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "out_channels": 3,
}


@waiting("reading the VAE")
def load(where: str, dtype: str = "float32") -> Autoencoder:
    """Returns a VAE. Raises UserError.

    where: a file, a folder with config.json and diffusion_pytorch_model.{safetensors,bin}, or a name of HUB, which is
    downloaded once. dtype: of products and activations, "float32" or "bfloat16". Without a config.json beside the file
    the VAE is taken to have 32 groups and the scale 0.18215.
    """
    path, pinned = where, None
    if where in HUB and not os.path.exists(where):
        revision, pinned = HUB[where]
        path = os.path.join(hub.fetch(where, [WEIGHTS], revision), WEIGHTS)
        if not os.path.isfile(path):
            raise UserError(
                f"{where}: its revision {revision} on the hub holds no {WEIGHTS}: name a VAE's folder or file"
            )
    elif os.path.isdir(where):
        names = (WEIGHTS, WEIGHTS.replace("safetensors", "bin"))
        files = [os.path.join(where, name) for name in names if os.path.isfile(os.path.join(where, name))]
        if not files:
            raise UserError(f"{where}: this folder holds no {WEIGHTS} (nor .bin): name a VAE's folder or file")
        path = files[0]
    elif not os.path.exists(where):
        raise UserError(f"{where!r}: no such file or folder: name a VAE's, or one of {', '.join(HUB)}")
    flat, sha256 = _read(path)
    if pinned and sha256 != pinned:
        raise UserError(f"{path}: is not what was published (its sha256 is {sha256}): delete it and run again")
    args = _infer_args(flat, path) | _read_config(os.path.join(os.path.dirname(path), "config.json"))
    scale = args.pop("scaling_factor", SCALE)
    with reading(path, "a VAE", "{reason}: put the VAE's own config.json beside it"):
        params = pytorch.to_flax(path, flat, network.abstract(**args, dtype=jnp.dtype(dtype))[1])
    name = where if where in HUB else os.path.basename(os.path.abspath(where))
    identity = dict(
        name=name,
        sha256=sha256,
        encoder=_digest(flat, ("encoder.", "quant_conv.")),
        decoder=_digest(flat, ("decoder.", "post_quant_conv.")),
        scale=scale,
    )
    return Autoencoder(args, params, scale, identity, dtype)


def save(folder: str | os.PathLike, args: Mapping[str, Any], params: Any, scale: float = SCALE) -> None:
    """Writes a VAE to a folder in the published format: config.json and the weights.

    args: of vae.network.VAE. params: tree of its parameters. scale: scaling_factor of the config.
    """
    from safetensors.numpy import save as to_safetensors

    levels = len(args["block_out_channels"])
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "out_channels": args["in_channels"],
        "scaling_factor": scale,
        **args,
    }
    write_aside(os.path.join(folder, WEIGHTS), to_safetensors(pytorch.from_flax(params)))
    write_aside(os.path.join(folder, "config.json"), (json.dumps(config, indent=2) + "\n").encode())


def _read(path: str) -> tuple[dict[str, np.ndarray], str]:
    """Returns the arrays of a file, float32 by today's names in the published layout, and the sha256 of the file."""
    flat = read_all(path)
    with reading(path, "a VAE"), open(path, "rb") as f:
        return _renamed(flat), hashlib.file_digest(f, "sha256").hexdigest()


def _renamed(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns arrays with names of any generation under today's names, as float32."""
    prefix = "first_stage_model."  # in a Stable Diffusion checkpoint
    if any(name.startswith(prefix) for name in flat):
        flat = {name.removeprefix(prefix): a for name, a in flat.items() if name.startswith(prefix)}
    levels = sum(bool(re.fullmatch(r"decoder\.up\.\d+\.block\.0\.conv1\.weight", name)) for name in flat)
    renamed = {}
    for name, a in flat.items():
        if name.startswith(("loss.", "model_ema.")):  # left over from its training
            continue
        if a.dtype.kind not in "fiub":
            raise ValueError(f"{name} is {str(a.dtype):.60}, not numbers")
        name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", name)  # CompVis counts backwards
        for pattern, new in RENAMES:
            name = pattern.sub(new, name)
        if ".attentions." in name and a.shape[2:] == (1, 1):
            a = a[:, :, 0, 0]
        renamed[name] = a.astype(np.float32, copy=False)
    return renamed


def _read_config(path: str) -> dict[str, Any]:
    """Returns the arguments of vae.network.VAE and the `scaling_factor` that a config.json has; {} without a file."""
    if not os.path.exists(path):
        return {}
    with reading(path, "a config"):
        with open(path) as f:
            config = json.loads(f.read(2**20))
        for field, value in FIXED.items():
            if config.get(field, value) != value:
                raise UserError(f"{path}: {field}={repr(config[field])[:60]}: only {value!r} is supported")
        scale = config.get("scaling_factor", SCALE)
        if type(scale) not in (int, float) or not 0 < float(scale) < math.inf:
            raise UserError(f"{path}: scaling_factor={repr(scale)[:60]}: must be positive")
        config = {field: config[field] for field in (*network.PUBLISHED, "scaling_factor") if field in config}
        for field, value in config.items():
            many = field == "block_out_channels"
            if field != "scaling_factor" and not _are_counts(value if many else [value]):
                kind = "a list of counts" if many else "a count"
                raise UserError(f"{path}: {field}={repr(value)[:60]}: must be {kind}")
        return {field: tuple(value) if isinstance(value, list) else value for field, value in config.items()}


def _are_counts(values: Any) -> bool:
    """Whether `values` is a list of 1 to MAX_LEVELS integers from 1 to 65,535."""
    if not isinstance(values, list) or not 0 < len(values) <= MAX_LEVELS:
        return False
    return all(type(v) is int and 0 < v < 2**16 for v in values)


def _infer_args(flat: Mapping[str, np.ndarray], path: str) -> dict[str, Any]:
    """Returns the arguments of vae.network.VAE by the shapes of its arrays; norm_num_groups is assumed to be 32."""

    def shape(name):
        if name not in flat:
            raise UserError(f"{path}: {name} is missing: this is no VAE of Stable Diffusion, or not all of it")
        if flat[name].ndim != 4 or 0 in flat[name].shape:
            raise UserError(f"{path}: {name} has shape {flat[name].shape}: this is no VAE of Stable Diffusion")
        return flat[name].shape

    conv1 = re.compile(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv1\.weight")
    resnets = [(int(m[1]), int(m[2])) for m in map(conv1.fullmatch, flat) if m] or [(0, 0)]
    levels, layers = (max(numbers) + 1 for numbers in zip(*resnets))
    if max(levels, layers) > MAX_LEVELS:
        raise UserError(f"{path}: has {levels} levels of {layers} layers: this is no VAE of Stable Diffusion")
    return dict(
        block_out_channels=tuple(shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)),
        layers_per_block=layers,
        latent_channels=shape("post_quant_conv.weight")[0],
        norm_num_groups=32,
        in_channels=shape("encoder.conv_in.weight")[1],
    )


def _digest(flat: Mapping[str, np.ndarray], prefixes: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in sorted(name for name in flat if name.startswith(prefixes)):
        digest.update(name.encode() + np.ascontiguousarray(flat[name]).tobytes())
    return digest.hexdigest()[:16]
