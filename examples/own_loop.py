"""Trains this package's network in a loop of your own: python examples/own_loop.py"""

import jax
import jax.numpy as jnp
import optax
from flax.nnx import Rngs, merge
from sklearn.datasets import load_digits

from dit_jax.diffusion.ddpm import training_losses
from dit_jax.diffusion.process import linear_schedule
from dit_jax.models.dit import DiT, split

pixels, labels = load_digits(return_X_y=True)
images = jnp.asarray(pixels.reshape(-1, 8, 8, 1) / 8 - 1, jnp.float32)
graphdef, params = split(
    DiT(input_size=8, in_channels=1, patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=10, rngs=Rngs(0))
)
optimizer, process = optax.adam(1e-3), linear_schedule(1000)


@jax.jit
def train_step(params, opt_state, key):
    key_rows, key_t, key_noise = jax.random.split(key, 3)
    rows, t = jax.random.randint(key_rows, (64,), 0, len(images)), jax.random.randint(key_t, (64,), 0, 1000)
    x, y = images[rows], jnp.asarray(labels)[rows]

    def loss(params):
        model, noise = merge(graphdef, params), jax.random.normal(key_noise, x.shape)
        return training_losses(process, lambda x_t, t: model(x_t, t, y), x, t, noise)["loss"].mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


opt_state = optimizer.init(params)
for step in range(200):
    params, opt_state, value = train_step(params, opt_state, jax.random.key(step))
print(f"step 200  loss {value:.3f}")
