"""q(x_t | x_0), the learned-range variance and the hybrid loss (DDPM, Improved DDPM; paper section 3.1).

Everything is float32; tables come from a float64 `Schedule` and are cast on use. A model is any function
model_fn(x_t, t) -> (B, H, W, 2C), t being timesteps of the unrespaced process. `t` below indexes the schedule.
"""

import jax
import jax.numpy as jnp
import numpy as np


def table(values, t, ndim):
    """values[t] of a float64 table as float32, broadcast to (B, 1, ..., 1)."""
    values = jnp.asarray(values, jnp.float32)[t]
    return values.reshape(values.shape + (1,) * (ndim - 1))


def q_sample(schedule, x_start, t, noise):
    """x_t of q(x_t | x_0): DDPM equation 4."""
    alphas_cumprod = schedule.alphas_cumprod
    return (table(np.sqrt(alphas_cumprod), t, x_start.ndim) * x_start
            + table(np.sqrt(1 - alphas_cumprod), t, x_start.ndim) * noise)


def predict_x_start(schedule, x_t, t, eps):
    """x_0 from x_t and the noise: DDPM equation 4, solved. Not clipped."""
    alphas_cumprod = schedule.alphas_cumprod
    return (table(np.sqrt(1 / alphas_cumprod), t, x_t.ndim) * x_t
            - table(np.sqrt(1 / alphas_cumprod - 1), t, x_t.ndim) * eps)


def q_posterior(schedule, x_start, x_t, t):
    """Mean and log variance of q(x_{t-1} | x_t, x_0): DDPM equation 7."""
    mean = (table(schedule.posterior_mean_coef1, t, x_t.ndim) * x_start
            + table(schedule.posterior_mean_coef2, t, x_t.ndim) * x_t)
    return mean, table(schedule.posterior_log_variance_clipped, t, x_t.ndim)


def p_mean_variance(schedule, model_output, x_t, t):
    """p(x_{t-1} | x_t) of a network output (B, H, W, 2C) -> dict of mean, variance, log_variance, pred_xstart,
    each (B, H, W, C). The variance is interpolated between beta and the posterior's in log space by
    f = (v + 1) / 2, which is not clamped: Improved DDPM equation 15."""
    eps, v = jnp.split(model_output, 2, axis=-1)
    f = (v + 1) / 2
    log_variance = (f * table(np.log(schedule.betas), t, x_t.ndim)
                    + (1 - f) * table(schedule.posterior_log_variance_clipped, t, x_t.ndim))
    pred_xstart = predict_x_start(schedule, x_t, t, eps)
    mean, _ = q_posterior(schedule, pred_xstart, x_t, t)
    return dict(mean=mean, variance=jnp.exp(log_variance), log_variance=log_variance, pred_xstart=pred_xstart)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N1 || N2) in nats, elementwise."""
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + jnp.exp(log_variance1 - log_variance2)
                  + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2))


@jax.custom_jvp
def tanh(x):
    """tanh whose last bit is right. XLA's is off by a few units, and the likelihood below takes the logarithm of
    differences of that size. The derivative is the usual 1 - tanh**2, as in the published code."""
    return jnp.sign(x) * (1 - 2 / (jnp.exp(2 * jnp.abs(x)) + 1))


@tanh.defjvp
def _tanh_jvp(primals, tangents):
    y = tanh(*primals)
    return y, (1 - y * y) * tangents[0]


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """log p of x under a Gaussian integrated over bins of width 2/255 around x, the outermost bins reaching to
    infinity (DDPM equation 13), in nats. The normal CDF is the tanh approximation of the published code."""
    def cdf(z):
        return 0.5 * (1 + tanh(np.float32(np.sqrt(2 / np.pi)) * (z + 0.044715 * z**3)))

    centered, inv_scale = x - mean, jnp.exp(-log_scale)
    upper = cdf(inv_scale * (centered + 1 / 255))
    lower = cdf(inv_scale * (centered - 1 / 255))

    def log(p):
        return jnp.log(jnp.maximum(p, 1e-12))

    return jnp.where(x < -0.999, log(upper), jnp.where(x > 0.999, log(1 - lower), log(upper - lower)))


def mean_flat(x):
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def vb_term(schedule, model_output, x_start, x_t, t):
    """One term of the variational bound in bits per dimension, (B,): the KL to the true posterior, and at t = 0
    the discretised negative log likelihood."""
    true_mean, true_log_variance = q_posterior(schedule, x_start, x_t, t)
    p = p_mean_variance(schedule, model_output, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"])
    nll = -discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
    return jnp.where(t == 0, mean_flat(nll), mean_flat(kl)) / np.log(2.0)


def training_losses(schedule, model_fn, x_start, t, noise):
    """The hybrid loss (paper section 3.1): mean-squared error on epsilon plus the bound, through which only the
    variance is trained. x_start and noise (B, H, W, C), t (B,) -> dict of loss, mse, vb, each (B,) float32."""
    x_t = q_sample(schedule, x_start, t, noise)
    out = model_fn(x_t, jnp.asarray(schedule.timestep_map)[t])
    eps, v = jnp.split(out, 2, axis=-1)
    mse = mean_flat(jnp.square(noise - eps))
    vb = vb_term(schedule, jnp.concatenate([jax.lax.stop_gradient(eps), v], axis=-1), x_start, x_t, t)
    return dict(loss=mse + vb, mse=mse, vb=vb)
