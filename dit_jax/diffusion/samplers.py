"""Samplers: the steps of DDPM and DDIM, the tables of solvers, and the loop over all steps inside one compiled program.

A sampler begins with standard normal noise and asks the network a known number of times. `init` makes its state of the
noise, `step` carries the state over one evaluation, `result` is the image. A model is any function model(x, t, h, i) of
the state, its times (B,), the interval of MeanFlow (B,) or None, and the index of the evaluation, counted from 0 at the
noise. noise_fn(j) returns the noise of j, shaped like x, where j falls to 0: j = len(sampler) is the initial noise.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dit_jax.diffusion.ddpm import Images, Output, Steps, p_mean_variance, table
from dit_jax.diffusion.process import Schedule
from dit_jax.diffusion.solvers import Tables

Model = Callable[..., Array]
NoiseFn = Callable[[Any], Images]  # of a Python int, or of the loop's counter
State = tuple[Array, ...]


def ddpm_step(schedule: Schedule, model_output: Output, x_t: Images, t: Steps, noise: Images) -> Images:
    """x_{t-1} ~ p(x_{t-1} | x_t), with the learned variance (DDPM algorithm 2). No noise is added at t = 0."""
    p = p_mean_variance(schedule, model_output, x_t, t)
    return p["mean"] + _unless_last(t, x_t) * jnp.exp(0.5 * p["log_variance"]) * noise


def ddim_step(
    schedule: Schedule, model_output: Output, x_t: Images, t: Steps, noise: Images | float, eta: float = 0.0
) -> Images:
    """x_{t-1} of DDIM (arXiv 2010.02502): equation 12, with sigma of equation 16. The learned variance is not used.

    No noise is added at t = 0.
    """
    eps = jnp.split(model_output, 2, axis=-1)[0]
    pred_xstart = p_mean_variance(schedule, model_output, x_t, t)["pred_xstart"]
    a = table(schedule.alphas_cumprod, t, x_t)
    a_prev = table(schedule.alphas_cumprod_prev, t, x_t)
    sigma = eta * jnp.sqrt((1 - a_prev) / (1 - a)) * jnp.sqrt(1 - a / a_prev)
    mean = jnp.sqrt(a_prev) * pred_xstart + jnp.sqrt(1 - a_prev - sigma**2) * eps
    return mean + _unless_last(t, x_t) * sigma * noise


def _unless_last(t, x):
    """1 where t > 0, else 0, shaped (B, 1, ..., 1) to multiply x."""
    return (t != 0).astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))


class Sampler(Protocol):
    """A sampler; len(sampler) is how many times it asks the network.

    times: the network's time at each evaluation. steps: the index of the step that each evaluation belongs to.
    """

    @property
    def times(self) -> Float[np.ndarray, " n"]: ...

    @property
    def steps(self) -> Int[np.ndarray, " n"]: ...

    def __len__(self) -> int: ...

    def init(self, noise_fn: NoiseFn) -> State: ...

    def step(self, model: Model, state: State, i: int | Int[Array, ""], noise_fn: NoiseFn) -> State: ...

    def result(self, state: State) -> Images: ...


@dataclass(frozen=True, eq=False)
class ScheduleSampler:
    """DDPM, or DDIM with noise eta, over all steps of a schedule."""

    schedule: Schedule
    kind: str
    eta: float = 0.0

    def __len__(self) -> int:
        return len(self.schedule)

    @property
    def times(self) -> Float[np.ndarray, " n"]:
        return self.schedule.timestep_map[::-1].astype(np.float64)

    @property
    def steps(self) -> Int[np.ndarray, " n"]:
        return np.arange(len(self))

    def init(self, noise_fn: NoiseFn) -> State:
        return (noise_fn(len(self)).astype(jnp.float32),)

    def step(self, model: Model, state: State, i: int | Int[Array, ""], noise_fn: NoiseFn) -> State:
        (x_t,), k = state, len(self) - 1 - i
        t = jnp.full((len(x_t),), k)
        out = model(x_t, jnp.asarray(self.schedule.timestep_map)[t], None, i)
        if self.kind == "ddpm":
            return (ddpm_step(self.schedule, out, x_t, t, noise_fn(k)),)
        noise = noise_fn(k) if self.eta else 0.0
        return (ddim_step(self.schedule, out, x_t, t, noise, self.eta),)

    def result(self, state: State) -> Images:
        return state[0]


@dataclass(frozen=True, eq=False)
class TableSampler:
    """Runs the Tables of a solver."""

    tables: Tables

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def times(self) -> Float[np.ndarray, " n"]:
        return self.tables.time

    @property
    def steps(self) -> Int[np.ndarray, " n"]:
        return self.tables.step

    def init(self, noise_fn: NoiseFn) -> State:
        x = self.tables.start * noise_fn(len(self)).astype(jnp.float32)
        return (x, x, *[jnp.zeros_like(x)] * self.tables.history)

    def step(self, model: Model, state: State, i: int | Int[Array, ""], noise_fn: NoiseFn) -> State:
        (x, base, *past), tables = state, self.tables

        def at(values):
            return jnp.asarray(values, jnp.float32)[i]

        noise = noise_fn(len(self) - 1 - i) if tables.draws.any() else jnp.zeros_like(x)
        if tables.before.any():
            x = x + at(tables.before) * noise
        seen = at(tables.scale) * x
        time, interval = (jnp.full((len(x),), at(values)) for values in (tables.time, tables.interval))
        out = model(seen, time, interval, i)[..., : x.shape[-1]]
        read = at(tables.read)
        d = (read[0] * seen + read[1] * out, *past)[: tables.history]
        terms = (x, base, noise, *d)

        def combine(row):
            return functools.reduce(jnp.add, (row[j] * term for j, term in enumerate(terms)))

        return (combine(at(tables.next)), combine(at(tables.keep)), *d)

    def result(self, state: State) -> Images:
        return state[0]


def sample(sampler: Sampler, model: Model, noise_fn: NoiseFn) -> Images:
    """Returns the images after all evaluations."""

    def body(i, state):
        return sampler.step(model, state, i, noise_fn)

    return sampler.result(jax.lax.fori_loop(0, len(sampler), body, sampler.init(noise_fn)))
