"""The likelihood of data under a flow: the change of variables along its ODE (arXiv 2011.13456, section 4.3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_jax.diffusion.ddpm import Images
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.levels import PATHS, convert
from dit_jax.diffusion.solvers import RUNGE_KUTTA


def log_likelihood(
    flow: Flow,
    model_fn: Callable[[Images, Float[Array, " b"]], Array],
    x: Images,
    key: jax.Array,
    steps: int,
    method: str = "heun",
) -> tuple[Float[Array, " b"], Images]:
    """Returns (log p(x) in nats, summed over the image; the latent that x comes from).

    The ODE runs from the data to the noise in `steps` equal steps of `method`, a key of solvers.RUNGE_KUTTA. The
    divergence of the velocity is Hutchinson's estimate with one draw of signs for each evaluation.

    model_fn: model_fn(x_t, t), what flow.prediction says; not x_0, which gives no velocity without noise (ValueError).
    """
    if flow.prediction == "x_0":
        raise ValueError("a prediction of x_0 gives no velocity at the data, where the ODE begins")
    path, (start, end) = PATHS[flow.path], flow.interval(flow.sample_eps)
    stages, weights = RUNGE_KUTTA[method]

    def velocity(x, t):
        at = jnp.full((1,) * x.ndim, t)
        u, v = convert(flow.prediction, "velocity", path.alpha(at), path.sigma(at), path.d_alpha(at), path.d_sigma(at))
        return u * x + v * model_fn(x, jnp.full(len(x), t))[..., : x.shape[-1]]

    def slope(x, t, key):
        """The velocity, and its divergence."""
        signs = jax.random.rademacher(key, x.shape, x.dtype)
        value, tangent = jax.jvp(lambda x: velocity(x, t), (x,), (signs,))
        return value, jnp.sum(signs * tangent, axis=tuple(range(1, x.ndim)))

    h = (start - end) / steps  # negative: time falls to that of the noise

    def step(i, state):
        x, total = state
        slopes: list[tuple[Array, Array]] = []
        for stage, row in enumerate([[], *stages]):
            at = x + h * sum((a * dx for a, (dx, _) in zip(row, slopes)), jnp.zeros_like(x))
            t = end + h * (i + sum(row))
            slopes.append(slope(at, t, jax.random.fold_in(key, i * len(weights) + stage)))
        dx, divergence = (sum(w * part for w, part in zip(weights, parts)) for parts in zip(*slopes))
        return x + h * dx, total + h * divergence

    x = x.astype(jnp.float32)
    latent, total = jax.lax.fori_loop(0, steps, step, (x, jnp.zeros(len(x))))
    size = np.prod(x.shape[1:])
    prior = -0.5 * (size * np.log(2 * np.pi) + jnp.sum(jnp.square(latent), axis=tuple(range(1, x.ndim))))
    return prior + total, latent
