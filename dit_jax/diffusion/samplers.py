"""Samplers: DDPM and DDIM steps, and the loop over all steps inside one compiled program.

As in ddpm.py, a model is any function model_fn(x_t, timesteps) -> (B, H, W, 2C), with timesteps of the unrespaced
process. noise_fn(i) returns the noise of step i of the schedule, shaped like x_t.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dit_jax.diffusion.ddpm import Images, ModelFn, Output, Steps, p_mean_variance, table
from dit_jax.diffusion.process import Schedule
from dit_jax.runtime.errors import UserError

NoiseFn = Callable[[Any], Images]  # of a Python int, or of the loop's counter


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


def step(
    schedule: Schedule,
    model_fn: ModelFn,
    x_t: Images,
    i: int | Int[Array, ""],
    noise_fn: NoiseFn,
    sampler: str = "ddpm",
    eta: float = 0.0,
) -> Images:
    """Returns x after step i of the schedule. Sampling begins with the last step. Other arguments: see sample."""
    if sampler not in ("ddpm", "ddim"):
        raise UserError(f"unknown sampler {sampler!r}: use 'ddpm' or 'ddim'")
    t = jnp.full((len(x_t),), i)
    out = model_fn(x_t, jnp.asarray(schedule.timestep_map)[t])
    if sampler == "ddpm":
        return ddpm_step(schedule, out, x_t, t, noise_fn(i))
    if eta:
        return ddim_step(schedule, out, x_t, t, noise_fn(i), eta)
    return ddim_step(schedule, out, x_t, t, 0.0)


def sample(
    schedule: Schedule, model_fn: ModelFn, x_T: Images, noise_fn: NoiseFn, sampler: str = "ddpm", eta: float = 0.0
) -> Images:
    """Returns x_0 after all steps of the schedule, from the last to the first.

    sampler: "ddpm" or "ddim". eta: of DDIM; 0 is deterministic, 1 as noisy as DDPM. Raises UserError.
    """

    def body(k, x_t):
        return step(schedule, model_fn, x_t, len(schedule) - 1 - k, noise_fn, sampler, eta)

    return jax.lax.fori_loop(0, len(schedule), body, x_T.astype(jnp.float32))
