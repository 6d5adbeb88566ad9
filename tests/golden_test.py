"""Equality with the published PyTorch code, whose arrays lie in golden/."""

import glob
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, ROOT, nhwc
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from dit_jax.diffusion import catalog, ddpm, samplers
from dit_jax.diffusion.guidance import guide
from dit_jax.diffusion.objectives import DDPM
from dit_jax.diffusion.process import linear_schedule, respace
from dit_jax.models.dit import position_embedding
from dit_jax.training.accumulate import gradient
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.step import TrainState, update
from dit_jax.weights import published

FULL = linear_schedule(1000)


def apply(graphdef):
    return jax.jit(lambda params, x, t, y: nnx.merge(graphdef, params)(x, t, y))


@pytest.mark.parametrize("which", ["a", "b"])
def test_forward_and_guided_forward(golden, network, which):
    args, graphdef, params, _ = network(which)
    z = golden(f"dit_{which}_forward.npz")
    x, model = nhwc(z["x"]), apply(graphdef)
    assert_allclose(model(params, x, z["t"], z["y"]), nhwc(z["out"]), atol=2e-5)
    for key in z:
        if key.startswith("cfg_"):
            # Times and labels of the file are those of the doubled batch; guide doubles x.
            half = len(x) // 2
            guided = guide(lambda x, *_: model(params, x, z["t"], z["y"]), z["y"][:half], 0, float(key[4:]))
            assert_allclose(guided(x[:half], z["t"][:half]), nhwc(z[key])[:half], atol=2e-5)


def test_position_embedding(golden):
    z = golden("pos_embed.npz")
    strides = eval(str(z["stride"]))
    for key, stride in strides.items():
        dim, grid = (int(part[1:]) for part in key.split("_"))
        assert_array_equal(position_embedding(dim, grid)[::stride], z[key])


@pytest.mark.parametrize("path", sorted(glob.glob(str(GOLDEN / "dit" / "schedule_*.npz"))))
def test_schedules(path):
    spec = path.split("schedule_")[1].removesuffix(".npz").replace("_", ",")
    schedule = FULL if spec == "full" else respace(FULL, spec)
    z = np.load(path)
    assert_array_equal(schedule.timestep_map, z["timestep_map"])
    for key in z:
        assert_allclose(getattr(schedule, key), z[key], rtol=1e-12)


def test_p_mean_variance(golden):
    z = golden("p_mean_variance.npz")
    p = ddpm.p_mean_variance(FULL, nhwc(z["model_output"]), nhwc(z["x_t"]), z["t"])
    for key, value in p.items():
        # x_0 at t = 999 divides by sqrt(abar) = 0.006: compare beside the array's size.
        assert_allclose(value, nhwc(z[key]), rtol=1e-5, atol=2e-6 * np.abs(z[key]).max(), err_msg=key)


def test_losses_of_a_given_output(golden):
    z = golden("losses_fixed_output.npz")
    x_t = ddpm.q_sample(FULL, nhwc(z["x0"]), z["t"], nhwc(z["noise"]))
    assert_allclose(x_t, nhwc(z["x_t"]), atol=1e-6)
    losses = ddpm.training_losses(FULL, lambda *_: nhwc(z["model_output"]), nhwc(z["x0"]), z["t"], nhwc(z["noise"]))
    for key in ("loss", "mse", "vb"):
        assert_allclose(losses[key], z[key], rtol=2e-5, err_msg=key)


def test_losses_and_gradients(golden, network):
    args, graphdef, params, _ = network("a")
    z = golden("losses_small_net.npz")

    def loss_fn(params):
        model = nnx.merge(graphdef, params)
        losses = ddpm.training_losses(FULL, lambda x, t: model(x, t, z["y"]), nhwc(z["x0"]), z["t"], nhwc(z["noise"]))
        return losses["loss"].mean(), losses

    (_, losses), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    for key in ("loss", "mse", "vb"):
        assert_allclose(losses[key], z[key], rtol=1e-4, err_msg=key)
    grads = published.to_published(grads, args)
    assert not grads.pop("pos_embed").any()
    for key in z:
        if key.startswith("grad:"):
            scale = np.abs(z[key]).max()
            assert_allclose(grads[key[5:]] / scale, z[key] / scale, atol=1e-4, err_msg=key)


def test_three_optimizer_steps_with_ema(golden, network):
    args, graphdef, params, _ = network("a")
    z = golden("train_3_steps.npz")
    settings = dict(learning_rate=1e-4, ema_decay=0.9999)
    for key in settings:
        settings[key] = float(z[key]) if key in z else settings[key]
    optimizer = make_optimizer(settings["learning_rate"])
    state = TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

    @jax.jit
    def step(state, x0, t, y, noise):
        def loss_fn(params, _):
            model = nnx.merge(graphdef, params)
            losses = ddpm.training_losses(FULL, lambda x, t: model(x, t, y), x0, t, noise)
            return losses["loss"].mean(), dict(loss=losses["loss"].mean())

        return update(state, *gradient(loss_fn, state.params, ()), optimizer, settings["ema_decay"])

    for i in range(len(z["t"])):
        state, metrics = step(state, nhwc(z["x0"][i]), z["t"][i], z["y"][i], nhwc(z["noise"][i]))
        assert_allclose(metrics["loss"], z["losses"][i], rtol=1e-5)
    assert state.step == len(z["t"])
    before = published.to_published(params, args)
    for kind, tree in (("param:", state.params), ("ema:", state.ema)):
        flat = published.to_published(tree, args)
        for key in z:
            if key.startswith(kind):
                name = key.removeprefix(kind)
                error, moved = np.abs(flat[name] - z[key]), np.abs(flat[name] - before[name])
                if name == "pos_embed":
                    assert error.max() < 1e-6 and not moved.any()
                    continue
                # Adam divides by the gradient's size: where a gradient is nearly 0, its rounding shows.
                assert error.max() < 2e-5, key
                # The EMA moves by about a weight's last bit, which each step may round either way.
                rounding = len(z["t"]) * np.spacing(np.abs(z[key]).max())
                assert np.quantile(error, 0.999) < 0.01 * moved.max() + rounding, key


@pytest.mark.parametrize("path", sorted(glob.glob(str(GOLDEN / "dit" / "sample_*.npz"))))
def test_whole_trajectories(path, network):
    args, graphdef, params, _ = network("a")
    z, model = np.load(path), apply(graphdef)
    schedule = respace(FULL, str(z["respacing"]))
    assert_array_equal(schedule.timestep_map, z["timestep_map"])
    half = len(z["y"])
    x_T = nhwc(z["z"])
    step_noise = nhwc(z["step_noise"])[:, :half]  # in the order drawn: the last step of the schedule first
    noises = np.concatenate([step_noise[::-1], x_T[None]])
    options = {"eta": float(z["eta"])} if "ddim" in path else {}
    sampler = catalog.make("ddim" if "ddim" in path else "ddpm", DDPM(), str(z["respacing"]), **options)
    assert len(sampler) == len(schedule)

    @jax.jit
    def run(params, noises):
        guided = guide(lambda *a: model(params, *a), z["y"], int(z["null_class"]), float(z["cfg_scale"]))
        return samplers.sample(sampler, lambda x, t, h, i: guided(x, t), lambda j: noises[j])

    out = run(params, noises)
    assert_allclose(out, nhwc(z["out"])[:half], atol=2e-5 * max(1, np.abs(z["out"]).max()))


@pytest.mark.slow
def test_all_of_it_as_users_compile_it():
    """The other tests leave out LLVM's optimizations (conftest.py)."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"DIT_JAX_COMPILED": ""}
    flags = ("-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow", "tests/golden_test.py")
    done = subprocess.run([sys.executable, "-m", "pytest", *flags], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
