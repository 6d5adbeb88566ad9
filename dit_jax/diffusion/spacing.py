"""The levels of noise that a solver visits of the discrete diffusion process, spaced as diffusers does."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dit_jax.diffusion.levels import Levels
from dit_jax.diffusion.process import Schedule
from dit_jax.diffusion.solvers import edm_ratios
from dit_jax.runtime.errors import UserError

Vector = Float[np.ndarray, " n"]


def ratios(schedule: Schedule) -> Vector:
    """sigma / alpha at each timestep, rising."""
    alpha_bar = schedule.alphas_cumprod
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def discrete_levels(time: Vector, ratio: Vector) -> Levels:
    """The levels of a process that preserves the variance. They have no velocity."""
    alpha = 1 / np.sqrt(1 + ratio**2)
    none = np.full(len(alpha), np.nan)
    return Levels(np.asarray(time, np.float64), alpha, ratio * alpha, none, none)


def timestep_of(schedule: Schedule, ratio: Vector) -> Vector:
    """The timestep, not rounded, at which sigma / alpha is `ratio`, interpolated in its logarithm."""
    return np.interp(np.log(ratio), np.log(ratios(schedule)), np.arange(len(schedule)))


def spaced_timesteps(num_timesteps: int, steps: int, spacing: str) -> Vector:
    """The timesteps of "linspace", "leading" or "trailing" spacing, from noise to data, rounded."""
    if spacing == "linspace":
        return np.linspace(0, num_timesteps - 1, steps + 1).round()[:0:-1]
    if spacing == "leading":  # divides by steps + 1, unlike DDIM's
        return (np.arange(steps + 1) * (num_timesteps // (steps + 1)))[:0:-1].astype(np.float64)
    return np.arange(num_timesteps, 0, -num_timesteps / steps)[:steps].round() - 1  # rounding can add an element


def spaced(schedule: Schedule, steps: int, spacing: str) -> Levels:
    """The levels of `steps` evaluations, from noise to data.

    spacing: linspace, leading, trailing, karras or lu. The last two space the levels evenly in (sigma / alpha)^(1/7)
    and in its logarithm, from the last timestep to the first. The network is then given the nearest timestep, and the
    solver the exact level.
    """
    if not 1 <= steps < len(schedule):
        raise UserError(f"steps={steps}: must be at least 1, and less than the {len(schedule)} timesteps")
    if spacing in ("karras", "lu"):
        table = ratios(schedule)
        if spacing == "karras":
            ratio = edm_ratios(steps, table[0], table[-1])
        else:
            ratio = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), steps))
        return discrete_levels(timestep_of(schedule, ratio).round(), ratio)
    time = spaced_timesteps(len(schedule), steps, spacing)
    return discrete_levels(time, ratios(schedule)[time.astype(int)])


def end(schedule: Schedule, final: str) -> tuple[float, float]:
    """(alpha, sigma) at the end: without noise ("zero"), or at the first timestep ("sigma_min")."""
    if final == "zero":
        return 1.0, 0.0
    at = discrete_levels(np.zeros(1), ratios(schedule)[:1])
    return float(at.alpha[0]), float(at.sigma[0])


@dataclass(frozen=True, eq=False)
class DDIMSchedule(Schedule):
    """A Schedule that names alpha_bar after each step, which need not be that of the next timestep visited."""

    after: Vector

    @property
    def alphas_cumprod_prev(self) -> Vector:
        return self.after


def ddim_schedule(schedule: Schedule, steps: int, name: str) -> DDIMSchedule:
    """diffusers' DDIM with "leading" or "trailing" spacing: each step goes num_timesteps // steps timesteps down.

    With trailing spacing, and steps that do not divide the timesteps, that is not quite where the next step begins.
    """
    total = len(schedule)
    if not 1 <= steps <= total:
        raise UserError(f"steps={steps}: must be at least 1, and at most the {total} timesteps")
    stride = total // steps
    if name == "leading":
        kept = np.arange(steps) * stride
    else:
        kept = np.sort(spaced_timesteps(total, steps, name).astype(int))
    alpha_bar, down = schedule.alphas_cumprod, kept - stride
    after = np.where(down >= 0, alpha_bar[np.maximum(down, 0)], 1.0)
    betas = 1 - alpha_bar[kept] / np.append(1.0, alpha_bar[kept][:-1])
    return DDIMSchedule(betas, schedule.timestep_map[kept], after)
