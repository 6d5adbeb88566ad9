"""The training state, and the training step: a plain function of (state, batch)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int

from dit_jax.diffusion.objectives import Objective
from dit_jax.models import dit
from dit_jax.training import accumulate
from dit_jax.training.accumulate import LossFn, Scalars
from dit_jax.training.averages import track

Batch = dict[str, jax.Array]  # x (B, H, W, C) float32, y (B,) int32


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a training step changes.

    step: how many updates were made. ema: a tree like params. averages: {name: a tree like params} of
    training.averages; empty unless the config asks for them.
    """

    step: Int[Array, ""]
    params: Any
    ema: Any
    opt_state: Any
    averages: dict[str, Any] = field(default_factory=dict)


def to_items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint (weights.checkpoint.ITEMS) of a TrainState; "averages" only if there are any."""
    optimizer = {"step": state.step, "opt_state": state.opt_state}
    items = {"params": state.params, "ema": state.ema, "optimizer": optimizer}
    return items | ({"averages": state.averages} if state.averages else {})


def from_items(items: dict[str, Any]) -> TrainState:
    """The TrainState of the items of a checkpoint."""
    optimizer, averages = items["optimizer"], items.get("averages", {})
    return TrainState(optimizer["step"], items["params"], items["ema"], optimizer["opt_state"], averages)


def init_state(
    key: jax.Array,
    model_args: dict[str, Any],
    optimizer: optax.GradientTransformation,
    averages: Sequence[str] = (),
) -> TrainState:
    """The state at step 0. The EMA starts as a copy of the parameters.

    model_args: of models.dit.DiT. averages: names of those to track. They start as zeros, which the first step forgets.
    """
    _, params = dit.split(dit.DiT(**model_args, rngs=nnx.Rngs(params=key)))
    ema, zeros = jax.tree.map(jnp.copy, params), {name: jax.tree.map(jnp.zeros_like, params) for name in averages}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), zeros)


def update(
    state: TrainState,
    grads: Any,
    metrics: Scalars,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    clip: float = 0.0,
) -> tuple[TrainState, Scalars]:
    """One update of parameters and EMA with a gradient, whose norm is limited to `clip`; 0: it is not.

    Returns (new state, metrics with grad_norm, before it is clipped, and param_norm).
    """
    with jax.named_scope("optimizer"):  # for profiles
        optimizer = optax.with_extra_args_support(optimizer)
        updates, opt_state = optimizer.update(_clipped(grads, clip), state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda e, p: e + (1 - ema_decay) * (p - e), state.ema, params)
        averages = {name: track(name, a, params, state.step + 1) for name, a in state.averages.items()}
        # Both are checked to be finite: the gradient for this step, the parameters for what would be saved.
        metrics = dict(metrics, grad_norm=optax.tree.norm(grads), param_norm=optax.tree.norm(params))
    return TrainState(state.step + 1, params, ema, opt_state, averages), metrics


def _clipped(grads, norm):
    if not norm:
        return grads
    scale = jnp.minimum(1, norm / optax.tree.norm(grads))
    return jax.tree.map(lambda g: scale * g, grads)


def make_train_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float,
    label_dropout: float,
    num_classes: int,
    clip: float = 0.0,
    gradient: Callable[[LossFn, Any, Any], tuple[Any, Scalars]] = accumulate.gradient,
) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """Returns step(state, batch) -> (state, metrics).

    Timesteps, noise and label drops are drawn for the global batch from (seed, step), so they do not depend on the
    devices. num_classes: 0 is unconditional; the labels are ignored and all are the null class, 0. clip: of update.
    gradient: training.accumulate.gradient, with its options.
    """

    def step(state, batch):
        x, y = batch["x"], batch["y"]
        key_t, key_noise, key_drop = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), 3)
        drawn = objective.draw(key_t, key_noise, x)
        if num_classes == 0:
            y = jnp.zeros_like(y)
        drawn |= dict(label=y, dropped=np.zeros(y.shape, bool), null=num_classes)
        if num_classes and label_dropout:
            drawn["dropped"] = objective.drop(key_drop, label_dropout, y.shape)
            y = jnp.where(drawn["dropped"], num_classes, y)

        whole = {name: value for name, value in drawn.items() if not np.ndim(value)}
        of_each = {name: value for name, value in drawn.items() if np.ndim(value)}

        def loss_fn(params, examples):
            x, y, drawn = examples
            losses = objective.losses(nnx.merge(graphdef, params), x, y, drawn | whole)
            means = jax.tree.map(jnp.mean, losses)
            return means["loss"], means

        grads, metrics = gradient(loss_fn, state.params, (x, y, of_each))
        return update(state, grads, metrics, optimizer, ema_decay, clip)

    return step
