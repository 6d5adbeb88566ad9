"""Classifier-free guidance (arXiv 2207.12598; paper section 3.1)."""

import jax.numpy as jnp

MAX_SCALE = 1000  # far beyond what makes pictures, and far below where float32 ends


def forward_with_cfg(model_fn, x, t, y, cfg_scale, channels=3):
    """One guided evaluation of a doubled batch, as published.

    x (2B, H, W, C), t (2B,), y (2B,): the first half holds the labels, the second the null class; both halves see
    the x of the first. channels: how many channels of epsilon are guided, the first ones; None is all. The paper's
    tables guide three of four; the other channels, and the variance, come from each half itself.
    Returns (2B, H, W, 2C).
    """
    half = x[: len(x) // 2]
    out = model_fn(jnp.concatenate([half, half]), t, y)
    channels = x.shape[-1] if channels is None else min(channels, x.shape[-1])
    eps, rest = out[..., :channels], out[..., channels:]
    conditional, unconditional = jnp.split(eps, 2)
    guided = unconditional + cfg_scale * (conditional - unconditional)
    return jnp.concatenate([jnp.concatenate([guided, guided]), rest], axis=-1)
