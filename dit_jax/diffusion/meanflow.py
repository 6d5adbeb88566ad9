"""MeanFlow (arXiv 2505.13447): a network of the average velocity between two times, which samples in one step.

z_t = (1 - t) x + t e, from noise e at t = 1 to data x at t = 0, with velocity v = e - x. The network is given t and the
interval h = t - r: u(z, t, h) is the mean of the velocity over [r, t], so that z_r = z_t - (t - r) u.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dit_jax.diffusion.ddpm import Images
from dit_jax.diffusion.levels import Levels

Times = Float[Array, " b"]
UFn = Callable[[Images, Times, Times, Int[Array, " b"]], Images]  # u(z, t, h, y)


@dataclass(frozen=True)
class MeanFlow:
    """MeanFlow's training.

    time: how t and r are drawn, "logit_normal" (the sigmoid of a normal variable with mean time_mean and deviation
    time_std) or "uniform". instantaneous: the share of the examples with r = t. omega, kappa: guidance that is trained
    in, equation 20 and appendix A.2; omega = 1 and kappa = 0 is none. t_start, t_end: the times between which it acts.
    norm_p, norm_eps: of the adaptive weight (section 4.3).
    """

    time: str = "logit_normal"
    time_mean: float = -0.4
    time_std: float = 1.0
    instantaneous: float = 0.75
    omega: float = 1.0
    kappa: float = 0.5
    t_start: float = 0.0
    t_end: float = 1.0
    norm_p: float = 1.0
    norm_eps: float = 0.01

    name = "meanflow"
    prediction = "velocity"  # the average one, and the velocity itself over an interval of length 0
    learn_sigma = False
    second_time = True

    @property
    def train_passes(self) -> int:
        """u and du/dt, two passes for the gradient, and those of the guidance."""
        guided = 0 if self.omega == 1 and self.kappa == 0 else 1 + bool(self.kappa)
        return 4 + guided

    def times(self, draw_t: Times, draw_r: Times) -> tuple[Times, Times]:
        """Turns two draws, standard normal or uniform in [0, 1), into (t, r), with r = t for the first examples."""
        if self.time == "logit_normal":
            draw_t, draw_r = (jax.nn.sigmoid(self.time_mean + self.time_std * d) for d in (draw_t, draw_r))
        t, r = jnp.maximum(draw_t, draw_r), jnp.minimum(draw_t, draw_r)
        same = jnp.arange(len(t)) < int(len(t) * self.instantaneous)
        return t, jnp.where(same, t, r)

    def draw(self, key_t: jax.Array, key_noise: jax.Array, x: Images) -> dict[str, Any]:
        """Draws the times and the noise of each example."""
        draw = jax.random.normal if self.time == "logit_normal" else jax.random.uniform
        t, r = self.times(*draw(key_t, (2, len(x))))
        return dict(t=t, r=r, noise=jax.random.normal(key_noise, x.shape, jnp.float32))

    def drop(self, key: jax.Array, rate: float, shape: tuple[int, ...]) -> Bool[Array, " b"]:
        """Which labels are dropped."""
        return drop_first(jax.random.uniform(key, shape), rate)

    def losses(
        self, network: Callable[..., Array], x: Images, y: Int[Array, " b"], drawn: dict[str, Any]
    ) -> dict[str, Float[Array, " b"]]:
        """The losses of each example: meanflow_losses.

        y: the labels, with those that were dropped replaced. drawn: of draw, and the step's {label: as given, dropped:
        whether it was dropped, null: the null class}.
        """
        return meanflow_losses(
            self,
            lambda z, t, h, y: network(z, t, y, h)[..., : z.shape[-1]],
            x,
            drawn["label"],
            drawn["dropped"],
            drawn["null"],
            drawn["t"],
            drawn["r"],
            drawn["noise"],
        )

    def levels(self, time: Float[np.ndarray, " n"]) -> Levels:
        """The levels at these times. There the network predicts the velocity where its interval is h = 0."""
        t = np.asarray(time, np.float64)
        return Levels(t, 1 - t, t, -np.ones_like(t), np.ones_like(t))


def drop_first(uniform: Float[Array, " b"], rate: float) -> Bool[Array, " b"]:
    """Which labels are dropped: as many as draws are below `rate`, the first ones by position.

    So the examples without a label are among those with r = t, as published.
    """
    return jnp.arange(len(uniform)) < jnp.sum(uniform < rate)


def guided_velocity(flow: MeanFlow, u_fn: UFn, z: Images, t: Times, v: Images, y: Array, null: int) -> Images:
    """The velocity that training aims at: omega v + (1 - omega - kappa) u(null) + kappa u(y), both u at h = 0.

    Outside of [t_start, t_end] it is v.
    """
    if flow.omega == 1 and flow.kappa == 0:
        return v
    zero = jnp.zeros_like(t)
    guided = flow.omega * v + (1 - flow.omega - flow.kappa) * u_fn(z, t, zero, jnp.full_like(y, null))
    if flow.kappa:
        guided = guided + flow.kappa * u_fn(z, t, zero, y)
    inside = (t >= flow.t_start) & (t <= flow.t_end)
    return jnp.where(inside.reshape((-1,) + (1,) * (z.ndim - 1)), guided, v)


def meanflow_losses(
    flow: MeanFlow,
    u_fn: UFn,
    x: Images,
    y: Int[Array, " b"],
    dropped: Bool[Array, " b"],
    null: int,
    t: Times,
    r: Times,
    noise: Images,
) -> dict[str, Array]:
    """Returns {loss, mse, weight} of each example: algorithm 1 with guidance (algorithm 3).

    The target of u is v - (t - r) du/dt, where d/dt follows z along v with r fixed: one forward-mode derivative. The
    loss is the squared error, summed over the image, divided by its own (error + norm_eps)^norm_p (weight). No gradient
    flows through target and weight. mse: the squared error of u against the straight velocity v.
    """
    column = (-1,) + (1,) * (x.ndim - 1)
    at, interval = t.reshape(column), (t - r).reshape(column)
    z, v = (1 - at) * x + at * noise, noise - x
    target_v = guided_velocity(flow, u_fn, z, t, v, y, null)
    target_v = jax.lax.stop_gradient(jnp.where(dropped.reshape(column), v, target_v))
    labels = jnp.where(dropped, null, y)
    one = jnp.ones_like(t)
    u, du_dt = jax.jvp(lambda z, t, h: u_fn(z, t, h, labels), (z, t, t - r), (target_v, one, one))
    target = jax.lax.stop_gradient(target_v - jnp.clip(interval, 0, 1) * du_dt)
    axes = tuple(range(1, x.ndim))
    error = jnp.sum(jnp.square(u - target), axis=axes)
    weight = jax.lax.stop_gradient((error + flow.norm_eps) ** flow.norm_p)
    return dict(loss=error / weight, mse=jnp.sum(jnp.square(u - v), axis=axes), weight=weight)
