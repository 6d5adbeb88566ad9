"""The paper's Gflops and parameter counts.

The paper's "Gflops" of a model are multiply-adds of one forward pass of one picture: double them for FLOPs.
"""

import jax
import numpy as np

from dit_jax.models.blocks import BLOCKS, MLP_RATIO
from dit_jax.models.dit import FREQUENCY_DIM, MODELS, abstract, model_args

# (Gflops, million parameters) as printed: tables 1 and 4, section 5 for 512 px.
PAPER = {
    "DiT-S/8": ("0.36", 33), "DiT-S/4": ("1.41", 33), "DiT-S/2": ("6.06", 33),
    "DiT-B/8": ("1.42", 131), "DiT-B/4": ("5.56", 130), "DiT-B/2": ("23.01", 130),
    "DiT-L/8": ("5.01", 459), "DiT-L/4": ("19.70", 458), "DiT-L/2": ("80.71", 458),
    "DiT-XL/8": ("7.39", 676), "DiT-XL/4": ("29.05", 675), "DiT-XL/2": ("118.64", 675),
    "DiT-XL/2 in_context": ("119.37", 449), "DiT-XL/2 cross_attention": ("137.62", 598),
    "DiT-XL/2 adaln": ("118.56", 600), "DiT-XL/2 adaln_zero": ("118.64", 675),
    "DiT-XL/2 512px": ("524.60", 675),
}


def macs(*, input_size, patch_size, in_channels, hidden_size, depth, block="adaln_zero", out_channels=None, **_):
    """Multiply-adds of the matrix products of one forward pass of one picture."""
    d, tokens = hidden_size, (input_size // patch_size) ** 2
    n = tokens + 2 * (block == "in_context")
    per_block = n * (4 + 2 * MLP_RATIO) * d * d + 2 * n * n * d
    if block == "cross_attention":  # q and proj of the tokens, k and v of the two conditions, attention
        per_block += (2 * n + 2 * 2) * d * d + 2 * n * 2 * d
    adaptive = {"adaln_zero": 6, "adaln": 4}.get(block, 0) * d * d
    patch = patch_size**2 * (in_channels + (out_channels or 2 * in_channels))  # patchify and the final linear layer
    return depth * (per_block + adaptive) + tokens * patch * d + (2 * d * d if adaptive else 0) + (FREQUENCY_DIM + d) * d


def paper_gflops(**args):
    """The figure that the paper prints. It does not say what it counts; matrix products alone fall short of it by up
    to 0.06 in 524.60. With one operation for each element that the blocks' two LayerNorms and the last one normalise,
    and a final layer of 6 channels for the latents' 8, all 17 printed figures come out to the last digit. That second
    part is inferred from the figures (it decides B/4 and 512 px), not stated anywhere."""
    d, tokens = args["hidden_size"], (args["input_size"] // args["patch_size"]) ** 2
    n = tokens + 2 * (args.get("block") == "in_context")
    norms = 2 * args["depth"] * n * d + tokens * d
    return (macs(**args, out_channels=-(-args["in_channels"] * 6 // 4)) + norms) / 1e9


def train_flops(**model_args):
    """FLOPs of one training step for one picture: the backward pass costs two forward passes. Recomputation (remat)
    is not counted."""
    return 3 * 2 * macs(**model_args)


def num_params(**model_args):
    """(parameters, how many of them are trained). The rest is the frozen position embedding, which the published
    weights hold and the paper's table 4 leaves out."""
    params = abstract(**model_args)[1]
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    return total, total - int(np.prod(params["pos_embed"].shape))


def paper_models():
    """{name as in PAPER: arguments of models.dit.DiT}."""
    base = dict(input_size=32, in_channels=4, num_classes=1000)
    models = {name: dict(base, **model_args(name)) for name in MODELS}
    models |= {f"DiT-XL/2 {block}": dict(base, block=block, **model_args("DiT-XL/2")) for block in BLOCKS}
    return models | {"DiT-XL/2 512px": dict(base, **model_args("DiT-XL/2") | {"input_size": 64})}
