"""DDPM with a learned variance: q(x_t | x_0), p(x_{t-1} | x_t) and the hybrid loss (paper section 3.1).

Sources: DDPM (arXiv 2006.11239), Improved DDPM (arXiv 2102.09672).

All arithmetic is float32. `t` indexes the steps of the schedule. A network is any function model_fn(x_t, timesteps),
with timesteps of the unrespaced process; its output is C channels of epsilon, then C channels of v.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dit_jax.diffusion.process import Schedule

Images = Float[Array, "b h w c"]
Steps = Int[Array, " b"]
Output = Float[Array, "b h w 2*c"]
ModelFn = Callable[[Images, Steps], Output]


def table(values: Float[np.ndarray, " s"], t: Steps, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Returns values[t] as float32, shaped (B, 1, ..., 1) to multiply x."""
    entries = jnp.asarray(values, jnp.float32)[t]
    return entries.reshape(entries.shape + (1,) * (x.ndim - 1))


def q_sample(schedule: Schedule, x_start: Images, t: Steps, noise: Images) -> Images:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon: DDPM equation 4."""
    alpha_bar, x_0 = schedule.alphas_cumprod, x_start
    return table(np.sqrt(alpha_bar), t, x_0) * x_0 + table(np.sqrt(1 - alpha_bar), t, x_0) * noise


def predict_x_start(schedule: Schedule, x_t: Images, t: Steps, eps: Images) -> Images:
    """x_0 = (x_t - sqrt(1 - alpha_bar_t) epsilon) / sqrt(alpha_bar_t): DDPM equation 15. It is not clipped."""
    alpha_bar = schedule.alphas_cumprod
    return table(np.sqrt(1 / alpha_bar), t, x_t) * x_t - table(np.sqrt(1 / alpha_bar - 1), t, x_t) * eps


def q_posterior(schedule: Schedule, x_start: Images, x_t: Images, t: Steps) -> tuple[Images, Float[Array, "b 1 1 1"]]:
    """Returns mean and log variance of q(x_{t-1} | x_t, x_0): DDPM equations 6 and 7."""
    coef_x0, coef_xt = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    mean = table(coef_x0, t, x_t) * x_start + table(coef_xt, t, x_t) * x_t
    return mean, table(schedule.posterior_log_variance_clipped, t, x_t)


def p_mean_variance(schedule: Schedule, model_output: Output, x_t: Images, t: Steps) -> dict[str, Images]:
    """Returns {mean, variance, log_variance, pred_xstart} of p(x_{t-1} | x_t), given the network's output.

    The mean is the posterior's at the predicted x_0. The log variance is interpolated between log beta_t and the
    posterior's by f = (v + 1) / 2, which is not clamped: Improved DDPM equation 15.
    """
    eps, v = jnp.split(model_output, 2, axis=-1)
    f = (v + 1) / 2
    log_beta, log_posterior = np.log(schedule.betas), schedule.posterior_log_variance_clipped
    log_variance = f * table(log_beta, t, x_t) + (1 - f) * table(log_posterior, t, x_t)
    pred_xstart = predict_x_start(schedule, x_t, t, eps)
    mean, _ = q_posterior(schedule, pred_xstart, x_t, t)
    return dict(mean=mean, variance=jnp.exp(log_variance), log_variance=log_variance, pred_xstart=pred_xstart)


def normal_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Array:
    """KL(N1 || N2) of two diagonal Gaussians in nats, elementwise."""
    of_variances = -1.0 + log_variance2 - log_variance1 + jnp.exp(log_variance1 - log_variance2)
    of_means = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (of_variances + of_means)


@jax.custom_jvp
def tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """tanh with a correct last bit.

    XLA's is off by a few units in the last place, and the likelihood below takes the logarithm of differences of that
    size. The derivative is 1 - tanh**2, as in the published code.
    """
    return jnp.sign(x) * (1 - 2 / (jnp.exp(2 * jnp.abs(x)) + 1))


@tanh.defjvp
def _tanh_jvp(primals, tangents):
    y = tanh(*primals)
    return y, (1 - y * y) * tangents[0]


def discretized_gaussian_log_likelihood(x: Images, mean: Images, log_scale: Images) -> Images:
    """log p(x) under a Gaussian, in nats, for x of 256 levels in [-1, 1]: DDPM equation 13.

    The density is integrated over the bin of width 2/255 around x. The outermost bins reach to infinity. The normal CDF
    is the tanh approximation of the published code.
    """

    def cdf(z):
        return 0.5 * (1 + tanh(np.float32(np.sqrt(2 / np.pi)) * (z + 0.044715 * z**3)))

    def log(p):
        return jnp.log(jnp.maximum(p, 1e-12))

    centered, inv_scale = x - mean, jnp.exp(-log_scale)
    upper = cdf(inv_scale * (centered + 1 / 255))
    lower = cdf(inv_scale * (centered - 1 / 255))
    return jnp.where(x < -0.999, log(upper), jnp.where(x > 0.999, log(1 - lower), log(upper - lower)))


def mean_flat(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """The mean over all dimensions but the first."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def vb_term(schedule: Schedule, model_output: Output, x_start: Images, x_t: Images, t: Steps) -> Float[Array, " b"]:
    """Term t of the variational bound in bits per dimension: DDPM equation 5.

    At t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the negative log likelihood of x_0.
    """
    true_mean, true_log_variance = q_posterior(schedule, x_start, x_t, t)
    p = p_mean_variance(schedule, model_output, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"])
    nll = -discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
    return jnp.where(t == 0, mean_flat(nll), mean_flat(kl)) / np.log(2.0)


def min_snr_weight(schedule: Schedule, t: Steps, gamma: float, prediction: str = "noise") -> Float[Array, " b"]:
    """The Min-SNR weight (arXiv 2303.09556) of the squared error at t, with SNR = alpha_bar / (1 - alpha_bar).

    min(SNR, gamma) for a prediction of x_0, over SNR for the noise, over SNR + 1 for the velocity.
    """
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    divisor = {"noise": snr, "x_0": 1.0, "velocity": snr + 1}[prediction]
    return jnp.asarray(np.minimum(snr, gamma) / divisor, jnp.float32)[t]


def training_losses(
    schedule: Schedule, model_fn: ModelFn, x_start: Images, t: Steps, noise: Images, min_snr: float = 0.0
) -> dict[str, Float[Array, " b"]]:
    """Returns {loss, mse, vb} of each example: the hybrid loss, Improved DDPM equation 16.

    mse is the squared error of epsilon (DDPM equation 14). vb trains only the variance: no gradient flows from it to
    epsilon. vb is the one term of the bound that t draws, on average 1/S of the bound. With S = 1000 steps that is the
    weight lambda = 0.001 of the equation. min_snr: gamma of min_snr_weight for mse in the loss; 0 weighs nothing.
    """
    x_t = q_sample(schedule, x_start, t, noise)
    out = model_fn(x_t, jnp.asarray(schedule.timestep_map)[t])
    eps, v = jnp.split(out, 2, axis=-1)
    mse = mean_flat(jnp.square(noise - eps))
    vb = vb_term(schedule, jnp.concatenate([jax.lax.stop_gradient(eps), v], axis=-1), x_start, x_t, t)
    weighted = min_snr_weight(schedule, t, min_snr) * mse if min_snr else mse
    return dict(loss=weighted + vb, mse=mse, vb=vb)
