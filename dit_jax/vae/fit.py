"""Fits a small VAE to pictures, in a minute or two on a laptop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import UInt8

from dit_jax.runtime.progress import Progress
from dit_jax.vae import network

VAE: dict[str, Any] = dict(
    block_out_channels=(8, 16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=4, in_channels=3
)


def fit(
    images: UInt8[np.ndarray, "n s s 3"], steps: int, rng: np.random.Generator, batch_size: int = 8
) -> tuple[dict[str, Any], float]:
    """Fits a VAE to images. Returns (its parameters, the scale that gives its latents a standard deviation of 1)."""
    graphdef, params = nnx.split(network.VAE(**VAE, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 4e-3, min(50, steps // 2), steps))

    def loss(params, x, key):
        model = nnx.merge(graphdef, params)
        mean, logvar = model.encode(x)
        reconstruction = model.decode(mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape))
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        return jnp.mean(jnp.abs(reconstruction - x)) + 1e-3 * kl

    @jax.jit
    def step(params, state, x, key):
        value, grads = jax.value_and_grad(loss)(params, x, key)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, progress = optimizer.init(params), Progress("vae", steps, "steps")
    for i in range(steps):
        x = images[rng.integers(len(images), size=batch_size)] / np.float32(127.5) - 1
        x = np.where(rng.random((batch_size, 1, 1, 1)) < 0.5, x, x[:, :, ::-1])
        params, state, value = step(params, state, x, jax.random.key(i))
        progress.update(i + 1, f"loss {value:.3f}")
    progress.close()
    encode = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(x))
    mean, _ = encode(params, images[::5] / np.float32(127.5) - 1)
    return params, float(1 / mean.std())
