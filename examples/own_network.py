"""Samples with this package's samplers from a network of your own: python examples/own_network.py

A model is any function of x_t and t that returns (B, H, W, 2C): the noise, then the interpolated variance. This one is
exact for data of mean 0.5 and standard deviation 0.1, so the samples can be checked.
"""

import jax
import jax.numpy as jnp

from dit_jax.diffusion import catalog, samplers
from dit_jax.diffusion.objectives import DDPM

MEAN, STD = 0.5, 0.1
objective = DDPM()
alphas_cumprod = jnp.asarray(objective.schedule.alphas_cumprod, jnp.float32)


def model(x_t, t, *_):
    a = alphas_cumprod[t][:, None, None, None]
    noise = jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * MEAN) / (1 - a + a * STD**2)  # E[noise | x_t]
    return jnp.concatenate([noise, jnp.zeros_like(noise)], axis=-1)


@jax.jit
def run(key):
    def noise(i):
        return jax.random.normal(jax.random.fold_in(key, i), (64, 8, 8, 1))

    return samplers.sample(catalog.make("ddpm", objective, 100), model, noise)  # or "unipc", 10


images = run(jax.random.key(0))
print(f"mean {images.mean():.3f}, standard deviation {images.std():.3f} of {images.shape}")
