"""The training state, and the step that `train` jits: a plain function of (state, batch)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dit_jax.diffusion.ddpm import training_losses
from dit_jax.models import dit


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    step: jax.Array  # () int32: how many updates were made
    params: Any
    ema: Any
    opt_state: Any


def to_items(state):
    """A TrainState -> the items of a checkpoint."""
    return {"params": state.params, "ema": state.ema, "optimizer": {"step": state.step, "opt_state": state.opt_state}}


def from_items(items):
    """The items of a checkpoint -> TrainState."""
    return TrainState(items["optimizer"]["step"], items["params"], items["ema"], items["optimizer"]["opt_state"])


def make_optimizer(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """AdamW at a constant rate. The frozen position embedding gets no gradient, and is not to decay either."""
    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "pos_embed", params)

    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)


def init_state(key, model_args, optimizer):
    """The state at step 0. The EMA starts as a copy of the parameters."""
    _, params = dit.split(dit.DiT(**model_args, rngs=nnx.Rngs(params=key)))
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def update(state, loss_fn, optimizer, ema_decay):
    """One optimizer and EMA update of loss_fn(params) -> (scalar, metrics)."""
    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    with jax.named_scope("optimizer"):  # for profiles
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda e, p: e + (1 - ema_decay) * (p - e), state.ema, params)
        # The gradient's norm tells of this step's arithmetic, the parameters' of what would be saved.
        metrics = dict(metrics, grad_norm=optax.tree.norm(grads), param_norm=optax.tree.norm(params))
    return TrainState(state.step + 1, params, ema, opt_state), metrics


def make_train_step(graphdef, schedule, optimizer, *, seed, ema_decay, label_dropout, num_classes):
    """step(state, batch) -> (state, metrics). batch: x (B, H, W, C) float32, y (B,) int32.

    num_classes 0: unconditional, every y is taken for the null class, 0.
    Timesteps, noise and label drops are drawn for the global batch from (seed, step) alone, whatever the devices.
    """
    def step(state, batch):
        x, y = batch["x"], batch["y"]
        key_t, key_noise, key_drop = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), 3)
        t = jax.random.randint(key_t, (len(x),), 0, len(schedule))
        noise = jax.random.normal(key_noise, x.shape, jnp.float32)
        if num_classes == 0:
            y = jnp.zeros_like(y)
        elif label_dropout:
            y = jnp.where(jax.random.bernoulli(key_drop, label_dropout, y.shape), num_classes, y)

        def loss_fn(params):
            model = nnx.merge(graphdef, params)
            losses = training_losses(schedule, lambda x_t, t: model(x_t, t, y), x, t, noise)
            means = jax.tree.map(jnp.mean, losses)
            return means["loss"], means

        return update(state, loss_fn, optimizer, ema_decay)

    return step
