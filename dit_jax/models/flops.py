"""Multiply-adds and parameter counts of a DiT, and those that the paper prints.

The paper's "Gflops" of a model are the multiply-adds of one forward pass on one image: the FLOPs are twice as many.
The functions take the arguments of dit.DiT.
"""

from typing import Any

import jax
import numpy as np

from dit_jax.models.blocks import BLOCKS, MLP_RATIO
from dit_jax.models.dit import FREQUENCY_DIM, abstract, model_args

# Name: (Gflops, million parameters), as printed in tables 1 and 4, and in section 5 for 512 px.
PAPER = {
    "DiT-S/8": ("0.36", 33),
    "DiT-S/4": ("1.41", 33),
    "DiT-S/2": ("6.06", 33),
    "DiT-B/8": ("1.42", 131),
    "DiT-B/4": ("5.56", 130),
    "DiT-B/2": ("23.01", 130),
    "DiT-L/8": ("5.01", 459),
    "DiT-L/4": ("19.70", 458),
    "DiT-L/2": ("80.71", 458),
    "DiT-XL/8": ("7.39", 676),
    "DiT-XL/4": ("29.05", 675),
    "DiT-XL/2": ("118.64", 675),
    "DiT-XL/2 in_context": ("119.37", 449),
    "DiT-XL/2 cross_attention": ("137.62", 598),
    "DiT-XL/2 adaln": ("118.56", 600),
    "DiT-XL/2 adaln_zero": ("118.64", 675),
    "DiT-XL/2 512px": ("524.60", 675),
}


def macs(
    *,
    input_size: int,
    patch_size: int,
    in_channels: int,
    hidden_size: int,
    depth: int,
    block: str = "adaln_zero",
    learn_sigma: bool = True,
    second_time: bool = False,
    out_channels: int | None = None,
    **_: Any,
) -> int:
    """Multiply-adds of the matrix products of one forward pass on one image.

    out_channels: of the head; by default those that learn_sigma makes.
    """
    d, tokens = hidden_size, (input_size // patch_size) ** 2
    conditions = 3 if second_time else 2
    n = tokens + conditions if block == "in_context" else tokens
    attention = 4 * n * d * d + 2 * n * n * d
    mlp = 2 * MLP_RATIO * n * d * d
    modulation = {"adaln_zero": 6, "adaln": 4}.get(block, 0) * d * d
    cross = 0
    if block == "cross_attention":  # q and proj of the tokens, k and v of the condition tokens, attention
        cross = (2 * n + 2 * conditions) * d * d + 2 * n * conditions * d
    timestep_mlps = (conditions - 1) * (FREQUENCY_DIM + d) * d
    out_channels = out_channels or (1 + learn_sigma) * in_channels
    patchify = tokens * patch_size**2 * in_channels * d
    final = tokens * patch_size**2 * out_channels * d + (2 * d * d if modulation else 0)
    return timestep_mlps + patchify + depth * (attention + cross + mlp + modulation) + final


def paper_gflops(**args: Any) -> float:
    """The Gflops that the paper prints.

    The paper does not say what it counts. Matrix products alone come out up to 0.06 lower (of 524.60). All 17 printed
    figures come out to the last digit with two changes: one operation for each element that the blocks' two LayerNorms
    and the last one normalise, and a final layer of 6 channels instead of the 8 that latents need. The second change
    is inferred from the figures of B/4 and of 512 px, and stated nowhere.
    """
    d, tokens = args["hidden_size"], (args["input_size"] // args["patch_size"]) ** 2
    n = tokens + 2 if args.get("block") == "in_context" else tokens
    layer_norms = 2 * args["depth"] * n * d + tokens * d
    out_channels = -(-args["in_channels"] * 6 // 4)
    return (macs(**args, out_channels=out_channels) + layer_norms) / 1e9


def train_flops(passes: int = 3, **args: Any) -> int:
    """FLOPs of one training step on one image. Remat is not counted.

    passes: forward passes that the step costs; 3 with a backward pass, which costs two.
    """
    return passes * 2 * macs(**args)


def num_params(**args: Any) -> tuple[int, int]:
    """Returns (parameters, trained parameters).

    The difference is the frozen position embedding: the published weights hold it, and the paper's table 4 does not
    count it.
    """
    params = abstract(**args)[1]
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    return total, total - int(np.prod(params["pos_embed"].shape))


def paper_models() -> dict[str, dict[str, Any]]:
    """Returns {name as in PAPER: arguments of dit.DiT}."""
    base = dict(input_size=32, in_channels=4, num_classes=1000)
    models = {}
    for name in PAPER:
        size, _, variant = name.partition(" ")
        change: dict[str, Any] = {"block": variant} if variant in BLOCKS else {"input_size": 64} if variant else {}
        models[name] = base | model_args(size) | change
    return models
