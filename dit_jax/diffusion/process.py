"""The diffusion process's tables and their respacing. Plain NumPy in float64: no JAX here.

Sources: DDPM (arXiv 2006.11239) for the process, Improved DDPM (arXiv 2102.09672) for respacing.
"""

from dataclasses import dataclass

import numpy as np

from dit_jax.runtime.errors import UserError


@dataclass(frozen=True, eq=False)
class Schedule:
    """A Gaussian diffusion process of S steps. Every table is (S,) float64.

    timestep_map: (S,) int64, the unrespaced timestep that the network is told at each step.
    """

    betas: np.ndarray
    timestep_map: np.ndarray

    def __len__(self):
        return len(self.betas)

    @property
    def alphas_cumprod(self):
        return np.cumprod(1.0 - self.betas)

    @property
    def alphas_cumprod_prev(self):
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def posterior_variance(self):
        """Of q(x_{t-1} | x_t, x_0), DDPM equation 7."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self):
        """The first entry repeats the second, because the variance at t = 0 is 0."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1], variance[1:])) if len(self) > 1 else np.log(self.betas)

    @property
    def posterior_mean_coef1(self):
        """Of x_0 in the posterior mean, DDPM equation 7."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self):
        """Of x_t in the posterior mean."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)


def linear_schedule(num_steps=1000):
    """Betas from 1e-4 to 2e-2 at 1000 steps (the paper's), scaled so that other counts end as noisy."""
    scale = 1000 / num_steps
    if scale * 0.02 >= 1:
        raise UserError(f"num_steps={num_steps}: a linear schedule needs more than 20 steps")
    return Schedule(np.linspace(scale * 1e-4, scale * 0.02, num_steps), np.arange(num_steps))


def kept_timesteps(num_steps, spec):
    """Which of `num_steps` timesteps a respaced process keeps: sorted (S,) int64.

    spec: "ddimN" keeps every (integer stride)-th from 0 on; "a,b,c" divides the process into equal sections and
    keeps a, b, c evenly spaced steps of them, both ends of a section included; a number is one section.
    """
    spec = str(spec)
    try:
        counts = [int(part) for part in spec.removeprefix("ddim").split(",")]
    except ValueError:
        raise UserError(f"steps={spec!r}: a number, 'a,b,c' or 'ddimN'") from None
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
            raise UserError(f"steps={spec!r}: cannot keep {count} of a section of {section} steps")
        stride = (section - 1) / (count - 1) if count > 1 else 1.0
        # Positions are accumulated, not multiplied: on ties of rounding that is what the published tables hold.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += section
    return np.unique(np.array(kept))


def respace(schedule, spec):
    """The process that visits only the kept timesteps of `schedule`, with the same marginals at them."""
    kept = kept_timesteps(len(schedule), spec)
    alphas_cumprod = schedule.alphas_cumprod[kept]
    return Schedule(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), schedule.timestep_map[kept])
