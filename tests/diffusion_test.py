import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from dit_jax.diffusion import catalog, ddpm, samplers
from dit_jax.diffusion.guidance import guide
from dit_jax.diffusion.objectives import DDPM
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
    exact, key = gaussian_model(0.5, 0.3), jax.random.key(0)
    sampler = catalog.make(sampler, DDPM(), steps, **({"eta": eta} if eta else {}))

    def noise_fn(i):
        return jax.random.normal(jax.random.fold_in(key, i), (64, 8, 8, 2))

    out = jax.jit(lambda: samplers.sample(sampler, lambda x, t, h, i: exact(x, t), noise_fn))()
    assert abs(out.mean() - 0.5) < 0.02 and abs(out.std() - 0.3) < 0.02


def test_sampling_is_one_compiled_loop():
    """The model appears once in the program, whatever the number of steps."""

    def program(steps):
        sampler = catalog.make(name, DDPM(), steps)

        def model(x, t, h, i):
            return jnp.concatenate([jnp.sin(x)] * 2, -1)

        return jax.jit(lambda x: samplers.sample(sampler, model, lambda i: x)).lower(jnp.zeros((1, 2, 2, 1))).as_text()

    for name in ("ddpm", "unipc"):
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
        x = rng.standard_normal((2, 2, 2, channels), np.float32)
        out = rng.standard_normal((4, 2, 2, 2 * channels), np.float32)
        seen = []

        def model(x, t, y):
            seen.append((np.asarray(x), np.asarray(y).tolist()))
            return out

        conditional, null = out[:2], out[2:]
        y, t = np.array([3, 4]), np.zeros(2, int)
        assert_allclose(guide(model, y, 9, 1.0)(x, t), conditional, atol=1e-6)
        assert_array_equal(seen[0][0], np.concatenate([x, x]))
        assert seen[0][1] == [3, 4, 9, 9]
        for few, n in ((3, min(3, channels)), (0, channels)):
            guided = np.asarray(guide(model, y, 9, 3.0, few)(x, t))
            assert_allclose(guided[..., :n], null[..., :n] + 3 * (conditional - null)[..., :n], atol=1e-5)
            assert_array_equal(guided[..., n:], conditional[..., n:])


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
