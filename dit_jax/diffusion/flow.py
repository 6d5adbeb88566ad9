"""Flow matching and stochastic interpolants: SiT (arXiv 2401.08740), LightningDiT's direction loss (arXiv 2501.01423),
JiT's prediction of the data (arXiv 2511.13720).

x_t = alpha(t) data + sigma(t) noise, from noise at t = 0 to data at t = 1. The network is given t as it is. Data are
x_1 in this file, as in SiT's paper. The prediction "x_0" is of data too: levels.py calls them so for all objectives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.special import logit, ndtr

from dit_jax.diffusion.ddpm import Images, mean_flat
from dit_jax.diffusion.levels import PATHS, Levels, path_levels

WEIGHTS = ("none", "velocity", "likelihood")
FLOW_PREDICTIONS = ("velocity", "noise", "score", "x_0")
LEAST_SIGMA = 0.05  # JiT divides an error of x_0 by no less
Times = Float[Array, " b"]


@dataclass(frozen=True)
class Flow:
    """Flow matching on a path.

    path: a key of levels.PATHS. prediction: what the network predicts, one of FLOW_PREDICTIONS. weight: of the loss of
    noise and score predictions, one of WEIGHTS. time: how t is drawn, "uniform" or "logit_normal", the sigmoid of a
    normal variable with mean time_mean and deviation time_std. time_low, time_high: only times between them are drawn.
    direction: adds LightningDiT's cosine loss.
    """

    path: str = "linear"
    prediction: str = "velocity"
    weight: str = "none"
    time: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_low: float = 0.0
    time_high: float = 1.0
    direction: bool = False

    name = "flow"
    learn_sigma = False
    second_time = False
    train_passes = 3

    @property
    def train_eps(self) -> float:
        """How near to the singular ends of the path training goes."""
        return 1e-5 if self.path == "vp" else self._eps

    @property
    def sample_eps(self) -> float:
        """How near to the singular ends of the path sampling goes."""
        return 1e-3 if self.path == "vp" else self._eps

    @property
    def _eps(self):
        return 1e-3 if self.prediction in ("noise", "score") else 0.0

    def interval(
        self, eps: float, stochastic: bool = False, form: str = "sigma", last_step: float = 0.0
    ) -> tuple[float, float]:
        """The times (t0, t1) between which a network is trained, or a solver runs, as published.

        eps: train_eps or sample_eps. stochastic: for an SDE with the diffusion `form`, whose last step from t1 to 1 has
        the size last_step.
        """
        end = 1 - (last_step if stochastic and last_step else eps)
        if self.path == "vp":
            return 0.0, end
        if not self._eps and not stochastic:
            return 0.0, 1.0
        begins_late = self._eps or form == "SBDM"
        return (eps if begins_late else 0.0), end

    def times(self, draws: Times) -> Times:
        """Turns draws, uniform in [0, 1) or standard normal, into times."""
        t0, t1 = self.time_range()
        if self.time == "logit_normal":
            return jnp.clip(jax.nn.sigmoid(self.time_mean + self.time_std * draws), t0, t1)
        return t0 + (t1 - t0) * draws

    def time_range(self) -> tuple[float, float]:
        """The times between which a network is trained."""
        t0, t1 = self.interval(self.train_eps)
        return max(t0, self.time_low), min(t1, self.time_high)

    def draw(self, key_t: jax.Array, key_noise: jax.Array, x: Images) -> dict[str, Any]:
        """Draws the time and the noise of each example."""
        shape, noise = (len(x),), jax.random.normal(key_noise, x.shape, jnp.float32)
        if self.time == "uniform":
            return dict(t=self.times(jax.random.uniform(key_t, shape)), noise=noise)
        if (self.time_low, self.time_high) == (0, 1):
            return dict(t=self.times(jax.random.normal(key_t, shape)), noise=noise)
        # LightningDiT draws again until a time lies in the range: the same distribution.
        low, high = self._normal_range()
        return dict(t=self.times(jax.random.truncated_normal(key_t, low, high, shape)), noise=noise)

    def _normal_range(self) -> tuple[float, float]:
        low, high = ((logit(t) - self.time_mean) / self.time_std for t in (self.time_low, self.time_high))
        return low, high

    def share_in_range(self) -> float:
        """How many of all times lie between time_low and time_high, or 0 where the path ends before."""
        t0, t1 = self.time_range()
        if t0 >= t1:
            return 0.0
        low, high = ndtr(self._normal_range()) if self.time == "logit_normal" else (t0, t1)
        return float(high - low)

    def drop(self, key: jax.Array, rate: float, shape: tuple[int, ...]) -> Bool[Array, " b"]:
        """Which labels are dropped."""
        return jax.random.bernoulli(key, rate, shape)

    def losses(
        self, network: Callable[..., Array], x: Images, y: Int[Array, " b"], drawn: dict[str, Any]
    ) -> dict[str, Float[Array, " b"]]:
        """The losses of each example: flow_losses. drawn: of draw."""
        return flow_losses(self, lambda x_t, t: network(x_t, t, y), x, drawn["t"], drawn["noise"])

    def levels(self, time: Float[np.ndarray, " n"]) -> Levels:
        """The levels at these times."""
        return path_levels(PATHS[self.path], time)

    def at_ratio(self, ratio: Float[np.ndarray, " n"]) -> Levels:
        """The levels at which sigma / alpha is `ratio`."""
        return self.levels(PATHS[self.path].time(np.asarray(ratio, np.float64)))


def flow_losses(
    flow: Flow, model_fn: Callable[[Images, Times], Array], x_1: Images, t: Times, noise: Images
) -> dict[str, Float[Array, " b"]]:
    """Returns {loss} of each example, and {mse, direction} where there is a direction loss.

    The squared error of the velocity, of the noise, or of the score times sigma; SiT equations 6 and 9, and section 3.4
    for the weights. Where the data are predicted it is that of the velocity which they give (JiT, table 1).
    Only the first C channels of the output count: a published network has C more, never trained.
    """
    path = PATHS[flow.path]
    at = t.reshape((-1,) + (1,) * (x_1.ndim - 1))
    alpha, sigma, d_alpha, d_sigma = (f(at) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    out = model_fn(alpha * x_1 + sigma * noise, t)[..., : x_1.shape[-1]]
    if flow.prediction == "velocity":
        target = d_alpha * x_1 + d_sigma * noise
        mse = mean_flat(jnp.square(out - target))
        if not flow.direction:
            return dict(loss=mse)
        direction = mean_flat(1 - cosine(out, target))
        return dict(loss=mse + direction, mse=mse, direction=direction)
    if flow.prediction == "x_0":
        slope = (d_alpha * sigma - d_sigma * alpha) / jnp.maximum(sigma, LEAST_SIGMA)  # of the velocity by x_0
        return dict(loss=mean_flat(jnp.square(slope * (out - x_1))))
    error = out - noise if flow.prediction == "noise" else sigma * out + noise
    # (d_alpha / alpha) sigma - d_sigma: the weight of sigma times the score in the velocity.
    weight = d_alpha / alpha * sigma - d_sigma
    weight = {"none": 1.0, "velocity": jnp.square(weight), "likelihood": weight / sigma}[flow.weight]
    return dict(loss=mean_flat(weight * jnp.square(error)))


def cosine(a: Images, b: Images) -> Float[Array, "b h w"]:
    """The cosine of the angle between the channels of two images at each pixel. A norm counts as 1e-8 at least."""

    def norm(x):
        return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1), 1e-16))

    return jnp.sum(a * b, axis=-1) / (norm(a) * norm(b))


def shift_times(t: Float[np.ndarray, " n"], shift: float) -> Float[np.ndarray, " n"]:
    """LightningDiT's time shift s t / (1 + (s - 1) t). Below 1 it puts more steps near the noise; 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)
