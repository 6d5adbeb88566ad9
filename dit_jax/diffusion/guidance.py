"""Classifier-free guidance (arXiv 2207.12598; paper section 3.1)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_SCALE = 1000  # far beyond scales that make images, and far below the overflow of float32


def forward_with_cfg(
    model_fn: Callable[[Array, Array, Array], Array],
    x: Float[Array, "2*n h w c"],
    t: Int[Array, " 2*n"],
    y: Int[Array, " 2*n"],
    cfg_scale: float | Float[Array, ""],
    channels: int | None = 3,
) -> Float[Array, "2*n h w 2*c"]:
    """Evaluates the network once on a doubled batch, as published.

    epsilon = epsilon(x, null) + cfg_scale * (epsilon(x, y) - epsilon(x, null))

    The first half of y holds the labels, the second half the null class. Both halves see the first half of x, and both
    get the guided epsilon. The variance comes from each half itself.

    channels: guides only the first channels of epsilon, None all of them. The paper's tables guide three of four.
    """
    half = x[: len(x) // 2]
    out = model_fn(jnp.concatenate([half, half]), t, y)
    channels = x.shape[-1] if channels is None else min(channels, x.shape[-1])
    eps, rest = out[..., :channels], out[..., channels:]
    conditional, unconditional = jnp.split(eps, 2)
    guided = unconditional + cfg_scale * (conditional - unconditional)
    return jnp.concatenate([jnp.concatenate([guided, guided]), rest], axis=-1)
