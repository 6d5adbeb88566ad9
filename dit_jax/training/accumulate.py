"""The gradient of a batch, whole or in parts: parts that fit the memory, one after another in one compiled step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_jax.parallel import sharding

Scalars = dict[str, Float[Array, ""]]
LossFn = Callable[[Any, Any], tuple[Float[Array, ""], Scalars]]  # (params, examples) -> (loss, metrics), means


def gradient(
    loss_fn: LossFn, params: Any, examples: Any, parts: int = 1, mesh: jax.sharding.Mesh | None = None
) -> tuple[Any, Scalars]:
    """Returns (the gradient of the loss of all examples, their metrics), float32.

    examples: a tree of arrays (B, ...). parts: how many passes of B / parts examples make it. mesh: the one that the
    batch is split over; needed for more than one part. The result does not depend on the parts but for rounding.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        (_, metrics), grads = value_and_grad(params, examples)
        return grads, metrics

    def add(total, part):
        (_, metrics), grads = value_and_grad(params, part)
        return jax.tree.map(jnp.add, total, grads), metrics

    assert mesh is not None
    zeros = jax.tree.map(jnp.zeros_like, params)
    split = jax.tree.map(lambda a: sharding.split_parts(a, parts, mesh), examples)
    total, metrics = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda g: g / parts, total), jax.tree.map(jnp.mean, metrics)
