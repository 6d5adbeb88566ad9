"""The diffusion process: its tables, and respacing. Plain NumPy in float64, without JAX.

Sources: DDPM (arXiv 2006.11239) for the process, Improved DDPM (arXiv 2102.09672) for respacing. The symbols of the
papers: beta_t is betas[t], alpha_bar_t is alphas_cumprod[t]. Their timesteps begin at 1, those of this package at 0.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dit_jax.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class Schedule:
    """A Gaussian diffusion process of S steps.

    timestep_map: the timestep of the unrespaced process at each step. The network is called with these.
    """

    betas: Float[np.ndarray, " s"]
    timestep_map: Int[np.ndarray, " s"]

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> Float[np.ndarray, " s"]:
        """alpha_bar, the product of 1 - beta up to each step: DDPM equation 4."""
        return np.cumprod(1.0 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> Float[np.ndarray, " s"]:
        """alpha_bar of the step before, 1 at the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def posterior_variance(self) -> Float[np.ndarray, " s"]:
        """The variance of q(x_{t-1} | x_t, x_0): DDPM equation 7."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> Float[np.ndarray, " s"]:
        """Its logarithm. The first entry repeats the second, because the variance at t = 0 is 0."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1], variance[1:])) if len(self) > 1 else np.log(self.betas)

    @property
    def posterior_mean_coef1(self) -> Float[np.ndarray, " s"]:
        """The coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0): DDPM equation 7."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> Float[np.ndarray, " s"]:
        """The coefficient of x_t in the same mean."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)


def linear_schedule(num_steps: int = 1000) -> Schedule:
    """Returns the paper's process (section 4): betas from 1e-4 to 2e-2 in 1000 steps.

    The betas of another number of steps are scaled so that the process ends with as much noise. Raises UserError
    for 20 steps or fewer.
    """
    scale = 1000 / num_steps
    if scale * 0.02 >= 1:
        raise UserError(f"num_steps={num_steps}: a linear schedule needs more than 20 steps")
    return Schedule(np.linspace(scale * 1e-4, scale * 0.02, num_steps), np.arange(num_steps))


def kept_timesteps(num_steps: int, spec: str | int) -> Int[np.ndarray, " s"]:
    """Returns the timesteps that a respaced process keeps of `num_steps`, sorted (Improved DDPM section 4).

    spec: "a,b,c" divides the process into equal sections and keeps a, b and c evenly spaced timesteps of them, both
    ends of a section included. A number is one section. "ddimN" keeps every k-th timestep from 0 on, for the integer k
    that keeps N of them. Raises UserError on a spec that cannot be met.
    """
    spec = str(spec)
    try:
        counts = [int(part) for part in spec.removeprefix("ddim").split(",")]
    except ValueError:
        raise UserError(f"steps={spec!r}: must be a number, 'a,b,c' or 'ddimN'") from None
    if min(counts) < 1:
        raise UserError(f"steps={spec!r}: the number of steps must be at least 1")
    if spec.startswith("ddim"):
        for stride in range(1, num_steps):
            if len(counts) == 1 and len(range(0, num_steps, stride)) == counts[0]:
                return np.arange(0, num_steps, stride)
        raise UserError(f"steps={spec!r}: no integer stride keeps exactly that many of {num_steps} steps")
    size, extra = divmod(num_steps, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        section = size + (i < extra)
        if count > section:
            raise UserError(f"steps={spec!r}: cannot keep {count} steps of a section of {section}")
        stride = (section - 1) / (count - 1) if count > 1 else 1.0
        # Positions are accumulated, not multiplied: where rounding ties, the published tables depend on it.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += section
    return np.unique(np.array(kept))


def respace(schedule: Schedule, spec: str | int) -> Schedule:
    """Returns the process that visits only the timesteps kept by `spec`, with the same q(x_t | x_0) at them.

    Improved DDPM section 4. spec: see kept_timesteps.
    """
    kept = kept_timesteps(len(schedule), spec)
    alphas_cumprod = schedule.alphas_cumprod[kept]
    return Schedule(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), schedule.timestep_map[kept])
