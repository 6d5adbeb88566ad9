"""The layout of the diffusers package: a folder that `diffusers.DiTPipeline.from_pretrained` opens.

Its network, DiTTransformer2DModel, differs from the paper's in two constants. Its timestep frequencies divide by 127,
the paper's by 128. One LayerNorm of each block has eps 1e-5, the paper's 1e-6. `save` sets the second constant to the
paper's value. The first cannot be set, so its pictures differ slightly from ours.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dit_jax.diffusion.objectives import DDPM, Objective
from dit_jax.models import dit
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading, write_aside
from dit_jax.weights import files

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PATTERNS = ["model_index.json", "*/config.json", "*/scheduler_config.json", *(f"*/{name}" for name in WEIGHTS)]
# A fetched folder is complete if it has a file for each of these.
NEEDED = ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"]
NEEDED += [f"{folder}/diffusion_pytorch_model.*" for folder in ("transformer", "vae")]
PAPER = DDPM()
NULL_CLASS = 1000  # DiTPipeline's, for any number of classes
# Published layer -> diffusers layer: BLOCK of a block, ENDS of the rest. diffusers stores the embedders (EMBEDDERS and
# LABELS) in every block.
BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}
LABELS = "norm1.emb.class_embedder.embedding_table.weight"
ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
}


class Lazy(Mapping[str, np.ndarray]):
    """{published name: array}. An array is made when it is asked for. path: for messages."""

    def __init__(self, path: str, makers: dict[str, Callable[[], np.ndarray]]):
        self.path, self.makers = path, makers

    def __getitem__(self, name: str) -> np.ndarray:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def is_folder(path: str) -> bool:
    """Whether `path` is the folder of a diffusers pipeline or of its transformer."""
    return os.path.isfile(_config_file(path))


def _transformer(path):
    subfolder = os.path.join(path, "transformer")
    return subfolder if os.path.isdir(subfolder) else path


def _config_file(path):
    return os.path.join(_transformer(path), "config.json")


def _read_json(path, required=True):
    """The mapping in a JSON file. If the file is not `required` and does not exist, {}."""
    if not required and not os.path.isfile(path):
        return {}
    with reading(path, "a config"), open(path) as f:
        value = json.loads(f.read(2**22))
        if not isinstance(value, dict):
            raise ValueError("not a mapping")
        return value


def read(path: str) -> tuple[Lazy, dict[str, Any]]:
    """Reads a pipeline's folder, or its transformer's.

    Returns ({published name: float32 array}, info). info has num_heads, num_classes, class_names (a list, or None),
    timesteps, and vae (the path of the VAE's folder, or ""). Raises UserError.
    """
    folder = _transformer(path)
    config = _read_json(_config_file(path))
    if config.get("norm_type", "ada_norm_zero") != "ada_norm_zero" or "num_attention_heads" not in config:
        raise UserError(f"{_config_file(path)}: is of {config.get('_class_name')!r:.60}, which is no DiT")
    candidates = [os.path.join(folder, name) for name in WEIGHTS]
    file = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
    if file is None:
        raise UserError(f"{folder}: this folder holds no {WEIGHTS[0]} (nor .bin): name a DiT pipeline's folder")
    flat = files.read(file)
    index = _read_json(os.path.join(path, "model_index.json"), required=False)
    scheduler = _read_json(os.path.join(path, "scheduler", "scheduler_config.json"), required=False)
    vae = os.path.join(path, "vae")
    with reading(path, "a DiT pipeline"):
        timesteps = int(scheduler.get("num_train_timesteps", 1000))
        expected = SCHEDULER | _betas(timesteps)
        for field in ("beta_schedule", "prediction_type", "beta_start", "beta_end") if scheduler else ():
            value, paper = scheduler.get(field, expected[field]), expected[field]
            if value != paper and not (isinstance(value, float) and math.isclose(value, paper, rel_tol=1e-6)):
                raise UserError(f"{path}/scheduler: {field}={value!r:.60}: only the paper's {paper!r} is supported")
        if int(config["sample_size"]) < 1 or int(config["patch_size"]) < 1:
            raise ValueError("sample_size or patch_size is not positive")
        names = _class_names(index.get("id2label"))
        rows = len(flat[f"transformer_blocks.0.{LABELS}"])
        return _to_published(file, flat, names, config), {
            "num_heads": int(config["num_attention_heads"]),
            "num_classes": len(names) if names and len(names) < rows else rows - 1,
            "class_names": names,
            "timesteps": timesteps,
            "vae": vae if os.path.isdir(vae) else "",
        }


def _class_names(id2label):
    if not isinstance(id2label, dict) or not id2label:
        return None
    return [str(id2label[str(i)]) for i in range(len(id2label))]


def _to_published(path, flat, names, config):
    """diffusers' arrays -> published ones. The embedders, stored in every block, are taken from the first."""
    makers: dict[str, Callable[[], np.ndarray]] = {}
    depth = 1 + max(
        (int(m[1]) for m in (re.match(r"transformer_blocks\.(\d+)\.", name) for name in flat) if m), default=-1
    )

    if depth > len(flat):  # the name of one array can claim any number of blocks
        raise UserError(f"{path}: has an array of block {depth - 1}, and {len(flat)} arrays in all: blocks are missing")

    def get(name):
        if name not in flat:
            raise UserError(f"{path}: {name} is missing")
        return flat[name]

    def take(published, diffusers_layer):
        for leaf in ("weight", "bias"):
            makers[f"{published}.{leaf}"] = lambda name=f"{diffusers_layer}.{leaf}": get(name)

    def qkv(block, leaf):
        return np.concatenate([get(f"{block}.attn1.to_{part}.{leaf}") for part in "qkv"])

    makers["pos_embed"] = lambda: _position_embedding(config, len(get("proj_out_2.weight")[0]))
    take("x_embedder.proj", ENDS["x_embedder.proj"])
    for published, layer in EMBEDDERS.items():
        take(published, f"transformer_blocks.0.{layer}")
    makers["y_embedder.embedding_table.weight"] = lambda: _label_table(get(f"transformer_blocks.0.{LABELS}"), names)
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for leaf in ("weight", "bias"):
            makers[f"blocks.{i}.attn.qkv.{leaf}"] = functools.partial(qkv, block, leaf)
        for published, layer in BLOCK.items():
            take(f"blocks.{i}.{published}", f"{block}.{layer}")
    for published in ("final_layer.linear", "final_layer.adaLN_modulation.1"):
        take(published, ENDS[published])
    return Lazy(path, makers)


def _label_table(table, names):
    """The rows of the classes and of the null class. The pipeline has the latter in row NULL_CLASS."""
    if names and len(names) < len(table) - 1:
        return np.concatenate([table[: len(names)], table[NULL_CLASS : NULL_CLASS + 1]])
    return table


def _position_embedding(config, width):
    return dit.position_embedding(width, config["sample_size"] // config["patch_size"])[None]


def check(folder: str, args: dict[str, Any], objective: Objective) -> None:
    """Raises UserError naming the folder if diffusers' DiT cannot be a network with the arguments `args`."""
    if not isinstance(objective, DDPM):
        raise UserError(f"{folder}: diffusers' DiT pipeline is of objective=ddpm, and this network of {objective.name}")
    if not args.get("learn_sigma", True) or args.get("second_time", False):
        lacks = "a second time" if args.get("second_time", False) else "no channels of the variance"
        raise UserError(f"{folder}: diffusers' DiT is the paper's, and this network has {lacks}: write a weights file")
    classes = args["num_classes"]
    if not 0 < classes <= NULL_CLASS or not args.get("null_class", True):
        raise UserError(
            f"{folder}: diffusers' DiT takes 1 to {NULL_CLASS} classes and a null class, and this model has {classes} "
            f"class(es), {'with' if args.get('null_class', True) else 'without'} a null class"
        )


def save(
    folder: str,
    flat: Mapping[str, np.ndarray],
    args: dict[str, Any],
    class_names: Sequence[str] | None,
    objective: Objective = PAPER,
) -> None:
    """Writes a pipeline's folder: transformer/, scheduler/ and model_index.json. vae.files.save writes vae/.

    DiTPipeline's null class is always label 1000. For fewer classes the rows between are filled with zeros.

    Args:
      flat: {published name: float32 array} of an adaLN-Zero DiT. args: the arguments of that DiT.
      class_names: None if the classes are only numbers.
    Raises: UserError if diffusers cannot represent the network or its objective.
    """
    check(folder, args, objective)
    assert isinstance(objective, DDPM)
    arrays = _from_published(flat, args)
    names = [str(name) for name in class_names or range(args["num_classes"])]
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": args["num_heads"],
        "attention_head_dim": args["hidden_size"] // args["num_heads"],
        "in_channels": args["in_channels"],
        "out_channels": 2 * args["in_channels"],
        "num_layers": args["depth"],
        "sample_size": args["input_size"],
        "patch_size": args["patch_size"],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "num_embeds_ada_norm": NULL_CLASS,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,  # the paper's; diffusers' default is 1e-5
    }
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    configs = {
        "transformer/config.json": config,
        "scheduler/scheduler_config.json": SCHEDULER | _betas(objective.timesteps),
        "model_index.json": index,
    }
    files.write(os.path.join(folder, "transformer", WEIGHTS[0]), arrays)
    for name, value in configs.items():
        write_aside(os.path.join(folder, name), (json.dumps(value, indent=2) + "\n").encode())


def _betas(timesteps):
    """The paper's noise schedule in the words of their scheduler (diffusion.process.linear_schedule)."""
    scale = 1000 / timesteps
    return {"num_train_timesteps": timesteps, "beta_start": scale * 0.0001, "beta_end": scale * 0.02}


def _from_published(flat, args):
    """Published arrays -> diffusers' arrays."""
    arrays = {}

    def put(published, diffusers_layer):
        for leaf in ("weight", "bias"):
            arrays[f"{diffusers_layer}.{leaf}"] = flat[f"{published}.{leaf}"]

    table = flat["y_embedder.embedding_table.weight"]
    padded = np.zeros((NULL_CLASS + 1, table.shape[1]), np.float32)
    padded[: len(table) - 1], padded[NULL_CLASS] = table[:-1], table[-1]
    for published, layer in ENDS.items():
        put(published, layer)
    for i in range(args["depth"]):
        block = f"transformer_blocks.{i}"
        for published, layer in EMBEDDERS.items():
            put(published, f"{block}.{layer}")
        arrays[f"{block}.{LABELS}"] = padded
        for published, layer in BLOCK.items():
            put(f"blocks.{i}.{published}", f"{block}.{layer}")
        for leaf in ("weight", "bias"):
            parts = np.split(flat[f"blocks.{i}.attn.qkv.{leaf}"], 3)
            for part, a in zip("qkv", parts):
                arrays[f"{block}.attn1.to_{part}.{leaf}"] = np.ascontiguousarray(a)
    return arrays
