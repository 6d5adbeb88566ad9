"""Levels of noise, and what a network's output means at them.

Every method here adds noise to data as x = alpha x_0 + sigma epsilon. A level is a pair (alpha, sigma), with the time
by which a network knows it. Time is that of each method's paper:

| objective | noise  | data | paper                         |
|-----------|--------|------|-------------------------------|
| ddpm      | t = 999| t = 0| DiT; integer timesteps        |
| flow      | t = 0  | t = 1| SiT, arXiv 2401.08740         |
| meanflow  | t = 1  | t = 0| MeanFlow, arXiv 2505.13447    |

Samplers never compare times. They visit levels in the order from noise to data, whatever their times are. A velocity is
dx / dt in the network's own time.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

PREDICTIONS = ("noise", "x_0", "velocity", "score")


@dataclass(frozen=True, eq=False)
class Levels:
    """Levels as float64 arrays of one shape. d_alpha, d_sigma: derivatives by time; nan where there is no velocity."""

    time: Float[np.ndarray, " n"]
    alpha: Float[np.ndarray, " n"]
    sigma: Float[np.ndarray, " n"]
    d_alpha: Float[np.ndarray, " n"]
    d_sigma: Float[np.ndarray, " n"]

    def convert(self, source: str, target: str) -> Float[np.ndarray, "n 2"]:
        """The rows (u, v) of each level with which target = u x + v output, for a network that predicts `source`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            u, v = convert(source, target, self.alpha, self.sigma, self.d_alpha, self.d_sigma)
        return np.stack(np.broadcast_arrays(u, v, self.time)[:2], axis=-1)


def convert(source: str, target: str, alpha: Any, sigma: Any, d_alpha: Any, d_sigma: Any) -> tuple[Any, Any]:
    """Returns (u, v) with which target = u x + v output, at x = alpha x_0 + sigma epsilon. Of NumPy or JAX arrays.

    source: what the output is, one of PREDICTIONS: epsilon, x_0, the velocity d_alpha x_0 + d_sigma epsilon, or the
    score -epsilon / sigma. target: likewise. Together with x, the output determines x_0 and epsilon: two equations,
    linear in both.
    """
    if source == target:
        return 0.0, 1.0
    if source == "score":  # through epsilon, so that nothing is divided by sigma
        u, v = convert("noise", target, alpha, sigma, d_alpha, d_sigma)
        return u, -sigma * v
    if target == "score":
        u, v = convert(source, "noise", alpha, sigma, d_alpha, d_sigma)
        return -u / sigma, -v / sigma
    parts = {"noise": (0.0, 1.0), "x_0": (1.0, 0.0), "velocity": (d_alpha, d_sigma)}  # of x_0 and of epsilon
    (a, b), (p, q) = parts[source], parts[target]
    determinant = alpha * b - sigma * a
    return (p * b - q * a) / determinant, (q * alpha - p * sigma) / determinant


class Linear:
    """alpha = t, sigma = 1 - t (SiT section 2.1; flow matching, arXiv 2210.02747). t = 0 is noise, t = 1 data."""

    def alpha(self, t: Any) -> Any:
        return t

    def sigma(self, t: Any) -> Any:
        return 1 - t

    def d_alpha(self, t: Any) -> Any:
        return _namespace(t).ones_like(t)

    def d_sigma(self, t: Any) -> Any:
        return -_namespace(t).ones_like(t)

    def time(self, ratio: Any) -> Any:
        """The t at which sigma / alpha is `ratio`."""
        return 1 / (1 + ratio)


class GVP:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): the path that preserves the variance (SiT section 2.1)."""

    def alpha(self, t: Any) -> Any:
        return _namespace(t).sin(t * (np.pi / 2))

    def sigma(self, t: Any) -> Any:
        return _namespace(t).cos(t * (np.pi / 2))

    def d_alpha(self, t: Any) -> Any:
        return np.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Any) -> Any:
        return -np.pi / 2 * self.alpha(t)

    def time(self, ratio: Any) -> Any:
        """The t at which sigma / alpha is `ratio`."""
        return 1 - 2 / np.pi * _namespace(ratio).arctan(ratio)


class VP:
    """The variance-preserving diffusion in continuous time (Score SDE, arXiv 2011.13456), with SiT's constants.

    With s = 1 - t: log alpha = -s^2 (beta_max - beta_min) / 4 - s beta_min / 2, sigma^2 = 1 - alpha^2.
    """

    beta_min, beta_max = 0.1, 20.0

    def _log_alpha(self, t):
        return -0.25 * (1 - t) ** 2 * (self.beta_max - self.beta_min) - 0.5 * (1 - t) * self.beta_min

    def _d_log_alpha(self, t):
        return 0.5 * (1 - t) * (self.beta_max - self.beta_min) + 0.5 * self.beta_min

    def alpha(self, t: Any) -> Any:
        return _namespace(t).exp(self._log_alpha(t))

    def sigma(self, t: Any) -> Any:
        xp = _namespace(t)
        return xp.sqrt(-xp.expm1(2 * self._log_alpha(t)))

    def d_alpha(self, t: Any) -> Any:
        return self.alpha(t) * self._d_log_alpha(t)

    def d_sigma(self, t: Any) -> Any:
        return -(self.alpha(t) ** 2) * self._d_log_alpha(t) / self.sigma(t)

    def time(self, ratio: Any) -> Any:
        """The t at which sigma / alpha is `ratio`: a quadratic equation in 1 - t."""
        xp, slope = _namespace(ratio), self.beta_max - self.beta_min
        root = xp.sqrt(0.25 * self.beta_min**2 + 0.5 * slope * xp.log1p(ratio**2))
        return 1 - (root - 0.5 * self.beta_min) / (0.5 * slope)


Path = Linear | GVP | VP
PATHS: dict[str, Path] = {"linear": Linear(), "gvp": GVP(), "vp": VP()}


def path_levels(path: Path, time: Float[np.ndarray, " n"]) -> Levels:
    """The levels of a path at these times."""
    t = np.asarray(time, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Levels(t, path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t))


def _namespace(t):
    return jnp if isinstance(t, jax.Array) else np
