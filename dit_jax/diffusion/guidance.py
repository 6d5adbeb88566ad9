"""Guidance, in one function for every sampler.

Classifier-free (arXiv 2207.12598; paper section 3.1), by a second network (autoguidance, arXiv 2406.02507), and in an
interval of times (arXiv 2404.07724).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MAX_SCALE = 1000  # far beyond scales that make images, and far below the overflow of float32

Network = Callable[..., Array]  # network(x, t, y), or network(x, t, y, h) with a second time


def guide(
    network: Network,
    y: Int[Array, " n"],
    null: int,
    scale: float | Float[Array, ""],
    channels: int = 3,
    *,
    reference: Network | None = None,
) -> Callable[..., Array]:
    """Returns model(x, t, *h, on=True) for the labels y, with the output

        output(x, null) + scale * (output(x, y) - output(x, null))

    in the first `channels` channels (0: all), and output(x, y) in the others. The network sees a batch twice as large.

    reference: a second network, in the place of the first one with the null class; it sees the labels y. on: whether to
    guide. Where it is false, only output(x, y) is computed, also if it is a traced value.
    """

    def guided(x, t, *h):
        colors = x.shape[-1]  # the output may have channels of the variance beside them
        if reference is not None:
            positive, negative = network(x, t, y, *h), reference(x, t, y, *h)
        else:
            x, t, *h = (jnp.concatenate([a, a]) for a in (x, t, *h))
            positive, negative = jnp.split(network(x, t, jnp.concatenate([y, jnp.full_like(y, null)]), *h), 2)
        few = min(channels, colors) if channels else colors
        toward = negative[..., :few] + scale * (positive[..., :few] - negative[..., :few])
        return jnp.concatenate([toward, positive[..., few:]], axis=-1)

    def conditional(x, t, *h):
        return network(x, t, y, *h)

    def model(x: Array, t: Array, *h: Array, on: bool | Bool[Array, ""] = True) -> Array:
        if isinstance(on, bool):
            return (guided if on else conditional)(x, t, *h)
        return jax.lax.cond(on, guided, conditional, x, t, *h)

    return model
