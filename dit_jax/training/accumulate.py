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
    loss_fn: LossFn,
    params: Any,
    examples: Any,
    *,
    parts: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    unrolled: bool = False,
) -> tuple[Any, Scalars]:
    """Returns (the gradient of the loss of all examples, their metrics), float32.

    examples: a tree of arrays (B, ...). parts: how many passes of B / parts examples make it; the result does not
    depend on it but for rounding. mesh: the one that the batch is split over, needed for more than one part. unrolled:
    whether the blocks of a DiT with these params are; takes less memory if so, more if not.
    """
    if parts == 1:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, examples)
        return grads, metrics
    assert mesh is not None
    # The gradient of stacked parameters is a stack of its own before it is added to the sum: a second copy. The
    # gradients of unrolled blocks can be added one by one.
    apart, together = (_blocks_apart, _blocks_together) if unrolled else (lambda tree: tree,) * 2

    def loss_apart(params, part):
        return loss_fn(together(params), part)

    def add(total, part):
        # Without the barrier XLA keeps bfloat16 copies of all parameters throughout the loop.
        whole, part = jax.lax.optimization_barrier((params, part))
        (_, metrics), grads = jax.value_and_grad(loss_apart, has_aux=True)(apart(whole), part)
        return jax.tree.map(jnp.add, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, apart(params))
    split = jax.tree.map(lambda a: sharding.split_parts(a, parts, mesh), examples)
    total, metrics = jax.lax.scan(add, zeros, split)
    return jax.tree.map(lambda g: g / parts, together(total)), jax.tree.map(jnp.mean, metrics)


def _blocks_apart(params):
    """Parameters with a list of the blocks in the place of their stack."""
    depth = len(jax.tree.leaves(params["blocks"])[0])
    return params | {"blocks": [jax.tree.map(lambda a: a[i], params["blocks"]) for i in range(depth)]}


def _blocks_together(params):
    return params | {"blocks": jax.tree.map(lambda *blocks: jnp.stack(blocks), *params["blocks"])}
