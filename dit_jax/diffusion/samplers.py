"""Samplers: one step, and the loop over all of them inside one compiled program.

model_fn(x_t, t) -> (B, H, W, 2C) with t (B,) timesteps of the unrespaced process; noise_fn(i) -> like x_t, the
noise of schedule step i.
"""

import jax
import jax.numpy as jnp

from dit_jax.diffusion.ddpm import p_mean_variance, table
from dit_jax.runtime.errors import UserError


def ddpm_step(schedule, model_output, x_t, t, noise):
    """x_{t-1} ~ p(x_{t-1} | x_t) with the learned variance; no noise at t = 0."""
    p = p_mean_variance(schedule, model_output, x_t, t)
    keep = (t != 0).astype(x_t.dtype).reshape((-1,) + (1,) * (x_t.ndim - 1))
    return p["mean"] + keep * jnp.exp(0.5 * p["log_variance"]) * noise


def ddim_step(schedule, model_output, x_t, t, noise, eta=0.0):
    """DDIM (arXiv 2010.02502) equation 12, its sigma scaled by eta (equation 16); the learned variance is unused."""
    eps = jnp.split(model_output, 2, axis=-1)[0]
    pred_xstart = p_mean_variance(schedule, model_output, x_t, t)["pred_xstart"]
    a = table(schedule.alphas_cumprod, t, x_t.ndim)
    a_prev = table(schedule.alphas_cumprod_prev, t, x_t.ndim)
    sigma = eta * jnp.sqrt((1 - a_prev) / (1 - a)) * jnp.sqrt(1 - a / a_prev)
    mean = jnp.sqrt(a_prev) * pred_xstart + jnp.sqrt(1 - a_prev - sigma**2) * eps
    keep = (t != 0).astype(x_t.dtype).reshape((-1,) + (1,) * (x_t.ndim - 1))
    return mean + keep * sigma * noise


def step(schedule, model_fn, x_t, i, noise_fn, sampler="ddpm", eta=0.0):
    """x_t (B, H, W, C) after step i of `schedule`, of which the last comes first. The arguments are those of sample."""
    if sampler not in ("ddpm", "ddim"):
        raise UserError(f"unknown sampler {sampler!r}: 'ddpm' or 'ddim'")
    t = jnp.full((len(x_t),), i)
    out = model_fn(x_t, jnp.asarray(schedule.timestep_map)[t])
    if sampler == "ddpm":
        return ddpm_step(schedule, out, x_t, t, noise_fn(i))
    if eta:
        return ddim_step(schedule, out, x_t, t, noise_fn(i), eta)
    return ddim_step(schedule, out, x_t, t, 0.0)


def sample(schedule, model_fn, x_T, noise_fn, sampler="ddpm", eta=0.0):
    """From x_T (B, H, W, C) to x_0 over all steps of `schedule`.

    sampler: "ddpm" or "ddim"; eta: of DDIM, 0 deterministic, 1 as noisy as DDPM.
    """
    def body(k, x_t):
        return step(schedule, model_fn, x_t, len(schedule) - 1 - k, noise_fn, sampler, eta)

    return jax.lax.fori_loop(0, len(schedule), body, x_T.astype(jnp.float32))
