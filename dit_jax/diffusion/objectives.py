"""Objectives: how a network is trained, and what its output means to a sampler.

An objective draws the times and the noise of a batch, computes the losses, and says what the network predicts at which
levels of noise. Its attributes: name; learn_sigma, whether the network's head has C more channels for the variance;
second_time, whether the network takes a second time; prediction, one of levels.PREDICTIONS; train_passes, what a
training step costs, in forward passes of the network.

The network does not know its objective: it is a function network(x, t, y), or network(x, t, y, h) with a second time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dit_jax.diffusion import spacing
from dit_jax.diffusion.ddpm import Images, training_losses
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.levels import Levels
from dit_jax.diffusion.meanflow import MeanFlow
from dit_jax.diffusion.process import Schedule, linear_schedule

Network = Callable[..., Array]


@dataclass(frozen=True)
class DDPM:
    """The paper's objective: noise, with a learned variance.

    timesteps: of the process. min_snr: gamma of the Min-SNR weight (arXiv 2303.09556) of the squared error; 0: none.
    """

    timesteps: int = 1000
    min_snr: float = 0.0

    name = "ddpm"
    prediction = "noise"
    learn_sigma = True
    second_time = False
    train_passes = 3

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The process of all timesteps."""
        return linear_schedule(self.timesteps)

    def draw(self, key_t: jax.Array, key_noise: jax.Array, x: Images) -> dict[str, Any]:
        """Draws the timestep and the noise of each example."""
        t = jax.random.randint(key_t, (len(x),), 0, len(self.schedule))
        return dict(t=t, noise=jax.random.normal(key_noise, x.shape, jnp.float32))

    def drop(self, key: jax.Array, rate: float, shape: tuple[int, ...]) -> Bool[Array, " b"]:
        """Which labels are dropped."""
        return jax.random.bernoulli(key, rate, shape)

    def losses(
        self, network: Network, x: Images, y: Int[Array, " b"], drawn: dict[str, Any]
    ) -> dict[str, Float[Array, " b"]]:
        """The losses of each example. drawn: of draw. Returns {loss, mse, vb}."""
        return training_losses(
            self.schedule, lambda x_t, t: network(x_t, t, y), x, drawn["t"], drawn["noise"], self.min_snr
        )

    def levels(self, time: Float[np.ndarray, " n"]) -> Levels:
        """The levels at these timesteps. Between two of them sigma / alpha is interpolated."""
        time = np.asarray(time, np.float64)
        return spacing.discrete_levels(time, np.interp(time, np.arange(self.timesteps), spacing.ratios(self.schedule)))

    def at_ratio(self, ratio: Float[np.ndarray, " n"]) -> Levels:
        """The levels at which sigma / alpha is `ratio`, with the nearest timesteps."""
        return spacing.discrete_levels(spacing.timestep_of(self.schedule, ratio).round(), ratio)


Objective = DDPM | Flow | MeanFlow
OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (DDPM, Flow, MeanFlow)}
