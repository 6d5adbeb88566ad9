"""The optimizer: AdamW with a constant rate as in the paper, and the recipes that others use."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from optax import contrib

from dit_jax.parallel.sharding import path_name

MUON_BETA = 0.95  # of Muon's momentum, as published
MUON_RMS = 0.2  # of an element of Muon's update before the rate: that of AdamW's, arXiv 2502.16982 section 2.2


def make_optimizer(
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    name: str = "adamw",
    warmup: int = 0,
    schedule: str = "constant",
    steps: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW; or with name="muon" Muon for the kernels of the blocks and AdamW for the rest. With decoupled decay.

    warmup, schedule: of rate_at. steps: of the whole run, for schedule="cosine". A rate that is not constant asks for
    the argument `step` of the optimizer's update. So the state is the same for every schedule, and a run can resume
    with another one. The position embedding is frozen: it has no gradient, and does not decay.
    """
    rate = optax.scale_by_learning_rate(learning_rate)
    if warmup or schedule != "constant":
        rate = _scale_by_rate(lambda step: rate_at(step, learning_rate, warmup, schedule, steps))

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "pos_embed", params)

    adamw = optax.chain(optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay, decayed), rate)
    if name == "adamw":
        return adamw
    muon = optax.chain(
        contrib.scale_by_muon(beta=MUON_BETA, weight_dimension_numbers=_matrices),
        optax.stateless(lambda updates, _: jax.tree.map(_match_rms, updates)),
        optax.add_decayed_weights(weight_decay),
        rate,
    )
    return optax.with_extra_args_support(optax.partition({"adamw": adamw, "muon": muon}, _kinds))


def rate_at(step: Int[Array, ""], learning_rate: float, warmup: int, schedule: str, steps: int) -> Float[Array, ""]:
    """The learning rate of the update after `step` others.

    It rises linearly over the first `warmup` updates, the last of which has all of it. Then it stays, or with
    schedule="cosine" falls as half a cosine, to 0 behind the last of `steps`.
    """
    rate = learning_rate * jnp.minimum(1.0, (step + 1) / max(1, warmup))
    if schedule == "constant":
        return rate
    share = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
    return rate * 0.5 * (1 + jnp.cos(math.pi * share))


def _scale_by_rate(rate: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, **arguments):
        return jax.tree.map(lambda u: -rate(arguments["step"]) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _kinds(params):
    """{parameter: its optimizer}, a tree.

    Muon is for what maps one hidden space to another: the kernels of the blocks. It makes all directions of an update
    equally large. That has no reason at the ends of the network, the embeddings of patches, times and labels and the
    final layer, which Muon's authors leave to AdamW; and biases and scales are no matrices.
    """

    def kind(path, _):
        name = path_name(path)
        return "muon" if name.startswith("blocks/") and name.endswith("kernel") else "adamw"

    return jax.tree_util.tree_map_with_path(kind, params)


def _matrices(updates):
    """Which axes of the kernels (L, in, out) make a matrix: each block has its own."""
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(1, 2), updates)


def _match_rms(update):
    """A singular value of 1 becomes such that an element is MUON_RMS large, whatever the kernel's shape."""
    return MUON_RMS * math.sqrt(max(update.shape[1:])) * update
