import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from dit_jax.diffusion import ddpm, samplers
from dit_jax.diffusion.guidance import forward_with_cfg
from dit_jax.diffusion.process import kept_timesteps, linear_schedule, respace

FULL = linear_schedule(1000)


def gaussian_model(mean, std):
    """The exact network for data N(mean, std^2): E[eps | x_t], and the variance at its posterior's end."""
    abar = jnp.asarray(FULL.alphas_cumprod, jnp.float32)

    def model_fn(x, t):
        a = abar[t].reshape(-1, 1, 1, 1)
        eps = jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mean) / (a * std**2 + 1 - a)
        return jnp.concatenate([eps, -jnp.ones_like(eps)], axis=-1)

    return model_fn


@pytest.mark.parametrize("sampler, eta, steps", [("ddpm", 0.0, "250"), ("ddim", 0.0, "ddim250"), ("ddim", 1.0, "250")])
def test_samplers_reach_a_known_distribution(sampler, eta, steps):
    """With the exact network for Gaussian data the samples have the data's mean and deviation."""
    schedule, key = respace(FULL, steps), jax.random.key(0)
    x_T = jax.random.normal(key, (64, 8, 8, 2))
    out = jax.jit(
        lambda x: samplers.sample(
            schedule,
            gaussian_model(0.5, 0.3),
            x,
            lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape),
            sampler,
            eta,
        )
    )(x_T)
    assert abs(out.mean() - 0.5) < 0.02 and abs(out.std() - 0.3) < 0.02


def test_sampling_is_one_compiled_loop():
    """The model appears once in the program, whatever the number of steps."""

    def program(steps):
        schedule = respace(FULL, steps)
        return (
            jax.jit(
                lambda x: samplers.sample(schedule, lambda x, t: jnp.concatenate([jnp.sin(x)] * 2, -1), x, lambda i: x)
            )
            .lower(jnp.zeros((1, 2, 2, 1)))
            .as_text()
        )

    assert program("250").count("sine") == program("10").count("sine") == 1
    assert program("250").count("stablehlo.while") >= 1


def test_respacing_keeps_the_marginals():
    for spec in ("250", "10,15,20", "ddim25", "1000", "1"):
        schedule = respace(FULL, spec)
        assert_allclose(schedule.alphas_cumprod, FULL.alphas_cumprod[schedule.timestep_map], rtol=1e-10)
    assert_array_equal(respace(FULL, "1000").betas.round(12), FULL.betas.round(12))


@pytest.mark.parametrize("spec", ["0", "-3", "1001", "x", "ddim7,3", "ddim999", "600,600", ""])
def test_impossible_respacing_is_refused(spec):
    with pytest.raises(ValueError, match="steps="):
        kept_timesteps(1000, spec)


def test_guided_channels_are_capped_and_scale_one_is_conditional():
    rng = np.random.default_rng(0)
    for channels in (1, 3, 4):
        x = rng.standard_normal((4, 2, 2, channels), np.float32)
        out = rng.standard_normal((4, 2, 2, 2 * channels), np.float32)
        seen = []

        def model(x, t, y):
            seen.append(np.asarray(x))
            return out

        guided = np.asarray(forward_with_cfg(model, x, np.zeros(4, int), np.zeros(4, int), 1.0, channels=3))
        assert_array_equal(seen[0][:2], seen[0][2:])
        n = min(3, channels)
        assert_allclose(guided[:2], out[:2], atol=1e-6)
        assert_allclose(guided[2:, ..., :n], out[:2, ..., :n], atol=1e-6)
        assert_array_equal(guided[2:, ..., n:], out[2:, ..., n:])
        every = np.asarray(forward_with_cfg(model, x, None, None, 3.0, channels=None))
        assert_allclose(
            every[:2, ..., :channels],
            out[2:, ..., :channels] + 3 * (out[:2, ..., :channels] - out[2:, ..., :channels]),
            atol=1e-5,
        )


def test_bound_trains_only_the_variance():
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 3, 4, 4, 2), np.float32)
    out = rng.standard_normal((3, 4, 4, 4), np.float32)
    t = np.array([0, 10, 900])

    def loss(out, name):
        return ddpm.training_losses(FULL, lambda *_: out, x, t, noise)[name].sum()

    vb, mse = (np.asarray(jax.grad(loss)(out, name)) for name in ("vb", "mse"))
    assert not vb[..., :2].any() and vb[..., 2:].any() and not mse[..., 2:].any() and mse[..., :2].any()


def test_likelihood_gradients_are_finite_far_out():
    x = np.zeros((2, 1, 1, 1), np.float32)
    out = np.array([[3e4, 0], [-1e6, 20]], np.float32).reshape(2, 1, 1, 2)
    grad = jax.grad(lambda out: ddpm.training_losses(FULL, lambda *_: out, x, np.array([0, 999]), x + 1)["loss"].sum())(
        out
    )
    assert np.isfinite(grad).all()
