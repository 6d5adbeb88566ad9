"""Samples with this package's samplers from a network of your own: python examples/own_network.py

A network is any function model(x_t, t) -> (B, H, W, 2C): the noise, then the interpolated variance. This one is exact
for data of mean 0.5 and standard deviation 0.1, so the samples can be checked.
"""

import jax
import jax.numpy as jnp

from dit_jax.diffusion.process import linear_schedule, respace
from dit_jax.diffusion.samplers import sample

MEAN, STD = 0.5, 0.1
process = linear_schedule(1000)
alphas_cumprod = jnp.asarray(process.alphas_cumprod, jnp.float32)


def model(x_t, t):
    a = alphas_cumprod[t][:, None, None, None]
    noise = jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * MEAN) / (1 - a + a * STD**2)  # E[noise | x_t]
    return jnp.concatenate([noise, jnp.zeros_like(noise)], axis=-1)


@jax.jit
def run(x_T, key):
    def noise_of_step(i):
        return jax.random.normal(jax.random.fold_in(key, i), x_T.shape)

    return sample(respace(process, "100"), model, x_T, noise_of_step, sampler="ddpm")


key = jax.random.key(0)
images = run(jax.random.normal(key, (64, 8, 8, 1)), key)
print(f"mean {images.mean():.3f}, standard deviation {images.std():.3f} of {images.shape}")
