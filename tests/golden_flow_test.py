"""Equality with the published code of SiT, LightningDiT, REPA, MeanFlow, EDM2, Min-SNR and diffusers.

Their arrays lie in golden/flow/. Every setting is read from the files: another family of the same keys is checked with
DIT_JAX_GOLDEN=FOLDER.
"""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, nhwc
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from dit_jax import config as configs
from dit_jax.diffusion import catalog, ddpm, samplers, solvers, spacing
from dit_jax.diffusion.flow import WEIGHTS, Flow, flow_losses
from dit_jax.diffusion.guidance import guide
from dit_jax.diffusion.levels import PATHS, Levels, path_levels
from dit_jax.diffusion.likelihood import log_likelihood
from dit_jax.diffusion.meanflow import MeanFlow, drop_first, meanflow_losses
from dit_jax.diffusion.objectives import DDPM
from dit_jax.diffusion.samplers import TableSampler
from dit_jax.models import dit
from dit_jax.training import averages
from dit_jax.training.step import TrainState, update
from dit_jax.weights import files as weight_files, published

PREDICTIONS = ("velocity", "noise", "score")
NAMES = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
METHODS = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun", "heun3": "heun3", "rk4": "rk4"}


def flow_file(name):
    return np.load(GOLDEN / "flow" / f"{name}.npz")


def text(z, key):
    return json.loads(str(z[key]))


def close(value, golden, tolerance, what=""):
    """Compares beside the largest value of the golden array."""
    value = np.asarray(value, np.float64)
    assert value.shape == golden.shape, (what, value.shape, golden.shape)
    error = np.abs(value - golden).max() / max(np.abs(golden).max(), 1e-30)
    assert error <= tolerance, f"{what}: {error:.2g}"


def states(sampler, model, noise, step_noise=()):
    """x after each step, run one evaluation after the other. step_noise[k]: the noise of step k."""

    def noise_fn(j):
        if j == len(sampler):
            return jnp.asarray(noise)
        k = sampler.steps[len(sampler) - 1 - j]
        return jnp.asarray(step_noise[k]) if k < len(step_noise) else jnp.zeros(noise.shape)

    state, out = sampler.init(noise_fn), []
    for i in range(len(sampler)):
        state = sampler.step(model, state, i, noise_fn)
        if i == len(sampler) - 1 or sampler.steps[i + 1] != sampler.steps[i]:
            out.append(np.asarray(sampler.result(state)))
    return np.stack(out)


def toy(z, prediction):
    a = text(z, "toy")
    return {
        "velocity": lambda x, t, *_: a["a"] * x * jnp.cos(a["b"] * column(t)) + a["c"],
        "noise": lambda x, t, *_: a["d"] * jnp.tanh(x) + a["e"] * column(t),
        "score": lambda x, t, *_: -x / (a["f"] + column(t)),
    }[prediction]


def column(t):
    return t.reshape(-1, 1, 1, 1)


@pytest.fixture(scope="session")
def apply(network):
    """apply(params) of network "a" -> a jitted function (x, t, y) and its null class."""
    args, graphdef, params, _ = network("a")
    f = jax.jit(lambda x, t, y: nnx.merge(graphdef, params)(x, t, y))
    return lambda x, t, y: f(x, t, y)


def guided_model(apply, y, null, scale, channels=3, on=None):
    """model(x, t, h, i) for a sampler. scale: None is without guidance. on: whether each evaluation is guided."""
    y = jnp.asarray(y)
    if scale is None:
        return lambda x, t, h, i: apply(x, t, y)
    guided = guide(apply, y, int(null), float(scale), channels)
    return lambda x, t, h, i: guided(x, t, on=True if on is None else bool(on[i]))


# Paths, conversions, losses.


@pytest.mark.parametrize("name", NAMES)
def test_paths_and_conversions(name):
    z = flow_file("sit_path")
    path = PATHS[NAMES[name]]
    levels, x, out = path_levels(path, z["t"]), nhwc(z[f"{name}:xt"]), nhwc(z["model_output"])
    for key in ("alpha", "d_alpha", "sigma", "d_sigma"):
        close(getattr(levels, key), z[f"{name}:{key}"], 1e-12, key)
        close(getattr(path, key)(jnp.asarray(z["t"])), z[f"{name}:{key}"], 2e-6, key)
    close(levels.d_alpha / levels.alpha, z[f"{name}:d_alpha_over_alpha"], 1e-12)
    close(path.time(levels.sigma / levels.alpha), levels.time, 1e-12, "time of a ratio")
    alpha, sigma, d_alpha, d_sigma = (column(a) for a in (levels.alpha, levels.sigma, levels.d_alpha, levels.d_sigma))
    close(alpha * nhwc(z["x1"]) + sigma * nhwc(z["x0"]), x, 1e-12, "xt")
    close(d_alpha * nhwc(z["x1"]) + d_sigma * nhwc(z["x0"]), nhwc(z[f"{name}:ut"]), 1e-12, "ut")
    close(-d_alpha / alpha * x, nhwc(z[f"{name}:drift_mean"]), 1e-12, "drift_mean")
    close(solvers.diffusion_weight(Flow(NAMES[name]), "SBDM", 1.0, z["t"]), z[f"{name}:drift_var"], 1e-12, "drift_var")
    for key in z.files:
        if key.startswith(f"{name}:diffusion:"):
            form, norm = key.split(":")[2:]
            weight = solvers.diffusion_weight(Flow(NAMES[name]), form.replace("inccr", "incr"), float(norm), z["t"])
            close(weight, z[key], 1e-12, key)

    def converted(source, target):
        u, v = levels.convert(source, target).T
        return column(u) * x + column(v) * out

    for source, target in (("velocity", "score"), ("velocity", "noise"), ("score", "velocity")):
        key = f"{name}:{target}_from_{source}"
        close(converted(source, target), nhwc(z[key]), 1e-12, key)
    for source in PREDICTIONS:
        close(converted(source, "velocity"), nhwc(z[f"{name}:{source}:drift"]), 1e-12, source)
        close(converted(source, "score"), nhwc(z[f"{name}:{source}:score"]), 1e-12, source)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_a_given_output(name):
    z = flow_file("sit_losses")
    x, noise, out = (nhwc(z[key]) for key in ("x1", "x0", "model_output"))
    for prediction in PREDICTIONS:
        for weight in WEIGHTS:
            flow = Flow(NAMES[name], prediction, weight)
            losses = flow_losses(flow, lambda x_t, t: out, x, jnp.asarray(z["t"]), noise)
            close(losses["loss"], z[f"{name}:{prediction}:{weight}"], 3e-6, (name, prediction, weight))


@pytest.mark.parametrize("name", NAMES)
def test_a_prediction_of_the_data_has_the_loss_of_its_velocity(name):
    """JiT's, which divides by a sigma of 0.05 at least."""
    z = flow_file("sit_losses")
    x, noise, velocity = (nhwc(z[key]) for key in ("x1", "x0", "model_output"))
    at = path_levels(PATHS[NAMES[name]], z["t"])
    u, v = (column(a) for a in at.convert("velocity", "x_0").T)
    data = u * (column(at.alpha) * x + column(at.sigma) * noise) + v * velocity
    loss = flow_losses(Flow(NAMES[name], "x_0"), lambda x_t, t: data, x, jnp.asarray(z["t"]), noise)["loss"]
    share = np.minimum(at.sigma / 0.05, 1) ** 2
    assert (share == 1).any()
    close(loss, share * z[f"{name}:velocity:none"], 1e-5, name)


def test_losses_and_gradients(network):
    args, graphdef, params, _ = network("a")
    z = flow_file("sit_losses_net")
    cases = [key.removesuffix(":loss") for key in z.files if key.endswith(":loss")]
    assert cases
    for case in cases:
        name, prediction, weight = case.split(":")
        flow, outputs = Flow(NAMES[name], prediction, weight), []

        def loss_fn(params):
            def model(x, t):
                outputs.append(nnx.merge(graphdef, params)(x, t, z["y"]))
                return outputs[-1]

            losses = flow_losses(flow, model, nhwc(z["x1"]), jnp.asarray(z["t"]), nhwc(z["x0"]))["loss"]
            return losses.mean(), (losses, outputs[-1][..., : args["in_channels"]])

        (_, (losses, out)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
        close(losses, z[f"{case}:loss"], 1e-5, case)
        close(out, nhwc(z[f"{case}:pred"]), 1e-5, case)
        grads = published.to_published(grads, args)
        for key in z.files:
            if key.startswith(f"{case}:grad:"):
                close(grads[key.partition(":grad:")[2]], z[key], 1e-5, key)


def test_the_times_of_training_and_of_solvers():
    z = flow_file("sit_interval")
    for c in text(z, "intervals"):
        flow = Flow(NAMES[c["path"]], c["prediction"])
        if c["given_train_eps"] is None and c["given_sample_eps"] is None:
            assert (flow.train_eps, flow.sample_eps) == (c["train_eps"], c["sample_eps"]), c
        for case in c["cases"]:
            eps = c["sample_eps"] if case["eval"] else c["train_eps"]
            t0, t1 = flow.interval(eps, case["sde"], case["diffusion_form"], case["last_step_size"])
            if case["reverse"]:
                t0, t1 = 1 - t0, 1 - t1
            assert (t0, t1) == pytest.approx((case["t0"], case["t1"]), abs=1e-15), (c["path"], case)
    for key in z.files:
        if key.endswith(":t"):
            name, prediction, _ = key.split(":")
            close(Flow(NAMES[name], prediction).times(jnp.asarray(z["u"])), z[key], 2e-6, key)


def test_lightning_transport():
    z = flow_file("lightning_transport")
    close(Flow(time="logit_normal").times(jnp.asarray(z["normal"])), z["t"], 2e-6)
    shifted = Flow(time="logit_normal", time_mean=float(z["shifted_mu"]))
    close(shifted.times(jnp.asarray(z["normal"])), z["t_shifted_mu"], 2e-6)
    close(Flow().times(jnp.asarray(z["uniform"])), z["t_uniform"], 2e-6)
    low, high = map(float, z["partial_range"])
    partial = Flow(time_low=low, time_high=high)
    close(partial.times(jnp.asarray(z["uniform"])), z["t_sp_timesteps"], 2e-6)
    partial = replace(partial, time="logit_normal")
    t = np.asarray(Flow(time="logit_normal").times(jnp.asarray(z["partial_normal_rounds"])))
    kept = t[(t >= low) & (t <= high)][: len(z["t_partial"])]
    close(kept, z["t_partial"], 2e-6)  # what LightningDiT keeps of its draws
    close(partial.times(np.log(kept / (1 - kept))), z["t_partial"], 2e-6)
    for name in ("Linear", "GVP"):
        flow = Flow(NAMES[name], direction=True)
        x, noise, out = (nhwc(z[key]) for key in ("x1", "x0", "model_output"))
        losses = flow_losses(flow, lambda x_t, t: out, x, jnp.asarray(z["t_loss"]), noise)
        close(losses["mse"], z[f"{name}:loss"], 3e-6, name)
        close(losses["direction"], z[f"{name}:cos_loss"], 3e-6, name)
        close(losses["loss"].mean(), np.mean(z[f"{name}:loss"]) + np.mean(z[f"{name}:cos_loss"]), 3e-6, name)
    for key in z.files:
        if key.startswith("shift") and key.split(":")[-1] in METHODS:
            shift, points, method = key.split(":")
            steps, shift = int(points[1:]) - 1, float(shift.removeprefix("shift")) or 1.0
            times = solvers.flow_times(0.0, 1.0, steps, shift)
            close(times, z[f"{key.rsplit(':', 1)[0]}:t"], 2e-6, key)
            sampler = TableSampler(solvers.runge_kutta(Flow(), METHODS[method], times))
            found = states(sampler, toy(z, "velocity"), nhwc(z["z"]))
            close(found, nhwc(z[key])[-len(found) :], 2e-6, key)


def test_repa_is_flow_matching_with_time_reversed():
    z = flow_file("lightning_transport")
    normal, uniform = jnp.asarray(z["normal"]), jnp.asarray(z["uniform"])
    for path, name in (("linear", "linear"), ("cosine", "gvp")):
        for weighting in ("lognormal", "uniform"):
            key = f"repa:{path}:{weighting}"
            ours = PATHS[name].time(jnp.exp(normal)) if weighting == "lognormal" else 1 - uniform
            close(1 - ours, z[f"{key}:t"], 2e-6, key)
            x, noise, out = (nhwc(z[k]) for k in ("x1", "x0", "model_output"))
            losses = flow_losses(Flow(name), lambda x_t, t: -out, x, jnp.asarray(1 - z[f"{key}:t"], jnp.float32), noise)
            close(losses["loss"], z[f"{key}:loss"], 3e-6, key)


def test_min_snr_weights():
    z = flow_file("min_snr")
    schedule, t = DDPM().schedule, jnp.asarray(z["t"])
    tested = 0
    for mean, kind, tag in (("EPSILON", "noise", "min"), ("VELOCITY", "velocity", "vmin"), ("START_X", "x_0", "min")):
        for key in z.files:
            if key.startswith(f"{mean}:{tag}_snr_") and key.endswith(":weight"):
                gamma = float(key.split(":")[1].rsplit("_", 1)[1])
                weight = ddpm.min_snr_weight(schedule, t, gamma, kind)
                close(weight, z[key], 1e-6, key)
                close(weight * z[f"{mean}:mse_raw"], z[key.replace(":weight", ":loss")], 1e-6, key)
                tested += 1
    x, noise, out = (nhwc(z[key]) for key in ("x0", "noise", "model_output"))
    for key in z.files:
        if key.startswith("EPSILON:") and key.endswith(":learned_range:loss"):
            tag = key.split(":")[1]
            if tag != "constant" and not tag.startswith("min_snr"):
                continue
            gamma = 0.0 if tag == "constant" else float(tag.rsplit("_", 1)[1])
            losses = ddpm.training_losses(schedule, lambda *_: out, x, t, noise, gamma)
            close(losses["loss"], z[key], 2e-5, key)
            close(losses["vb"], z["EPSILON:learned_range:vb"], 2e-5, key)
            tested += 1
    assert tested > 4


# Solvers.


def test_ode_solvers_on_a_toy():
    z = flow_file("sit_ode_toy")
    steps, tested = int(z["num_steps"]) - 1, 0
    for key in z.files:
        *case, method = key.split(":")
        if method not in METHODS:
            continue
        flow = Flow(NAMES[case[0]], case[1])
        start, end = flow.interval(flow.sample_eps)
        first = nhwc(z["z"])
        if "reverse" in case:
            start, end, first = end, start, nhwc(z[key])[0].astype(np.float32)
        times = solvers.flow_times(start, end, steps)
        if "reverse" not in case:
            close(times, z[f"{case[0]}:{case[1]}:t"], 1e-12, key)
        sampler = TableSampler(solvers.runge_kutta(flow, METHODS[method], times))
        assert len(sampler) == steps * len(solvers.RUNGE_KUTTA[METHODS[method]][1])
        close(np.concatenate([first[None], states(sampler, toy(z, case[1]), first)]), nhwc(z[key]), 2e-6, key)
        tested += 1
    assert tested >= 5
    # The true solution, to which rk4 converges.
    sampler = catalog.make("rk4", Flow(), 4 * 64)
    out = states(sampler, toy(z, "velocity"), nhwc(z["z"]))[-1]
    close(out, nhwc(z["Linear:velocity:dopri5_tight"])[-1], 2e-6)


def sde(case, points):
    """The sampler of a case of sit_sde."""
    settings = dict(
        form=case["diffusion_form"].replace("inccr", "incr"),
        norm=case["diffusion_norm"],
        last=(case["last_step"] or "none").lower(),
        last_size=case["last_step_size"],
    )
    flow = Flow(NAMES[case["path"]], case["prediction"])
    return solvers.sit_sde(flow, case["sampler"].lower(), points, eps=case.get("sample_eps"), **settings)


def test_sde_solvers_on_a_toy():
    z = flow_file("sit_sde_toy")
    for case in text(z, "cases"):
        tables = sde(case, int(z["num_steps"]))
        assert tables.finite, case
        last = tables.time[-1] if case["last_step"] else tables.time[-1] + case["dt"] * (case["sampler"] == "Euler")
        assert last == pytest.approx(case["t1"], abs=1e-12), case
        if case["last_step"] is None and case["sampler"] == "Heun" and case["path"] == "GVP":
            continue  # an evaluation at t = 1, where sigma is the rounding of cos(pi / 2)
        found = states(TableSampler(tables), toy(z, case["prediction"]), nhwc(z["z"]), nhwc(z["noise"]))
        golden = nhwc(z[case["key"]])
        if case["last_step"] is None:
            golden = golden[:-1]  # the last state is the one before it, twice
        close(found, golden, 4e-6, case["key"])
    for case in text(z, "failures"):
        if "key" in case:
            assert not sde(case, int(z["num_steps"])).finite, case


def test_sde_solvers_through_a_network(apply):
    z = flow_file("sit_sde_net")
    kept = len(z["y"])
    for case in text(z, "cases"):
        sampler = TableSampler(sde(case, int(z["num_steps"])))
        model = guided_model(apply, z["y"], z["null_class"], case["cfg_scale"])
        found = states(sampler, model, nhwc(z["z"]), nhwc(z["noise"])[:, :kept])
        close(found[z[f"{case['key']}:index"]], nhwc(z[f"{case['key']}:traj"]), 1e-5, case["key"])
        close(found[-1], nhwc(z[f"{case['key']}:out"])[:kept], 1e-5, case["key"])


def test_ode_solvers_through_a_network(apply):
    z = flow_file("sit_ode_net")
    kept = len(z["y"])
    for key in z.files:
        if not key.endswith(":out"):
            continue
        key = key.removesuffix(":out")
        name, prediction, method, points, cfg = key.split(":")
        flow = Flow(NAMES[name], prediction)
        times = solvers.flow_times(*flow.interval(flow.sample_eps), int(points) - 1)
        sampler = TableSampler(solvers.runge_kutta(flow, METHODS[method], times))
        scale = None if cfg == "nocfg" else float(cfg.removeprefix("cfg"))
        found = states(sampler, guided_model(apply, z["y"], z["null_class"], scale), nhwc(z["z"]))
        found = np.concatenate([nhwc(z["z"])[None], found])  # their index 0 is the noise
        close(found[z[f"{key}:index"]], nhwc(z[f"{key}:traj"]), 1e-5, key)
        close(found[-1], nhwc(z[f"{key}:out"])[:kept], 1e-5, key)


def test_lightning_sampling_with_shift_and_interval(apply):
    z = flow_file("lightning_ode_net")
    kept = len(z["y"])
    for case in text(z, "cases"):
        key, start = case["key"], case["cfg_interval_start"]
        times = solvers.flow_times(0.0, 1.0, case["num_steps"] - 1, case["timestep_shift"] or 1.0)
        close(times, z[f"{key}:t"], 2e-6, key)
        sampler = TableSampler(solvers.runge_kutta(Flow(), METHODS[case["method"]], times))
        # They decide at each evaluation, also within a step.
        model = guided_model(apply, z["y"], z["null_class"], case["cfg_scale"], on=sampler.times >= start)
        found = np.concatenate([nhwc(z["z"])[None], states(sampler, model, nhwc(z["z"]))])
        close(found[z[f"{key}:index"]], nhwc(z[f"{key}:traj"]), 1e-5, key)
        close(found[-1], nhwc(z[f"{key}:out"])[:kept], 1e-5, key)


def scheduler(config, steps):
    """The sampler of diffusers' scheduler with this config, by our names where it has one."""
    objective, kind = DDPM(config["num_train_timesteps"]), config["class_name"]
    name = "karras" if config.get("use_karras_sigmas") else "lu" if config.get("use_lu_lambdas") else ""
    name = name or config["timestep_spacing"]
    if kind == "DDIMScheduler":
        return catalog.make(f"ddim:spacing={name}", objective, steps)
    if kind == "EulerDiscreteScheduler":
        return catalog.make("euler", objective, steps)
    options = f"spacing={name},final={config['final_sigmas_type']}"
    if kind == "UniPCMultistepScheduler":
        return catalog.make(
            f"unipc:order={config['solver_order']},solver={config['solver_type']},{options}", objective, steps
        )
    stochastic = "sde_" if config["algorithm_type"].startswith("sde") else ""
    rule = f",rule={config['solver_type']}" if config["solver_order"] == 2 else ""
    return catalog.make(f"{stochastic}dpmpp_{config['solver_order']}m:{options}{rule}", objective, steps)


def test_schedulers_of_diffusers_on_a_toy():
    z = flow_file("dpm_toy")
    a = text(z, "toy")

    def model(x, t, *_):
        noise = a["d"] * jnp.tanh(x) + a["e"] * jnp.cos(a["b"] * column(jnp.asarray(t, jnp.float32)) / 1000)
        return jnp.concatenate([noise, jnp.zeros_like(noise)], axis=-1)

    for name, config in text(z, "configs").items():
        for steps in map(int, z["steps"]):
            key = f"{name}:{steps}"
            sampler = scheduler(config, steps)
            assert len(sampler) == steps
            np.testing.assert_allclose(sampler.times, z[f"{key}:timesteps"], atol=0 if "euler" not in name else 1e-4)
            if f"{key}:lambdas" in z.files and isinstance(sampler, TableSampler) and name != "euler":
                spaced = name_of(config)
                levels = spacing.spaced(DDPM().schedule, steps, spaced)
                end = spacing.end(DDPM().schedule, config["final_sigmas_type"])
                ratios = np.append(levels.sigma / levels.alpha, end[1] / end[0])
                close(ratios, z[f"{key}:sigmas"], 1e-12, key)
                close(np.log(levels.alpha / levels.sigma), z[f"{key}:lambdas"][:steps], 1e-12, key)
            found = states(sampler, model, nhwc(z["z"]), nhwc(z["noise"]))[z[f"{key}:index"]]
            close(found, nhwc(z[f"{key}:traj"]), 2e-6 if name != "euler" else 2e-5, key)


def name_of(config):
    return (
        "karras"
        if config.get("use_karras_sigmas")
        else "lu"
        if config.get("use_lu_lambdas")
        else config["timestep_spacing"]
    )


def test_schedulers_of_diffusers_through_a_network(apply):
    z = flow_file("dpm_net")
    kept, scale = len(z["y"]), z["cfg_scale"]
    for name, config in text(z, "configs").items():
        for steps in map(int, z["steps"]):
            key = f"{name}:{steps}"
            if f"{key}:traj" not in z.files:
                continue
            sampler = scheduler(config, steps)
            noise = nhwc(z[f"noise:{steps}"])[:, :kept] if name.startswith("sde") else ()
            model = guided_model(apply, z["y"], z["null_class"], scale, channels=0)
            found = states(sampler, model, nhwc(z["z"]), noise)
            close(found[z[f"{key}:index"]], nhwc(z[f"{key}:traj"]), 2e-5, key)
            three = f"three_channels:{key}:out"
            if three in z.files:
                model = guided_model(apply, z["y"], z["null_class"], scale)
                close(states(sampler, model, nhwc(z["z"]), noise)[-1], nhwc(z[three])[:kept], 2e-5, three)


class Denoiser:
    """A network that predicts x_0 and knows the level by sigma, with alpha = 1: EDM's own."""

    prediction = "x_0"

    def at_ratio(self, ratio):
        return Levels(ratio, np.ones_like(ratio), ratio, ratio, ratio)


def test_edm_sampler():
    z = flow_file("edm_sampler")

    def denoiser(p):
        def D(x, s):
            return (p[0] ** 2 * x + s**2 * p[1]) / (p[0] ** 2 + s**2) + p[2] * jnp.sin(x) * s / (1 + s)

        return lambda x, s, y: D(x, column(s))

    nets = {name: denoiser(p) for name, p in text(z, "nets").items()}

    def run(sampler, guidance, on=None):
        labels = jnp.zeros(len(z["noise"]), int)
        guided = guide(nets["net"], labels, 0, guidance, channels=0, reference=nets["gnet"])
        seen = []

        def model(x, s, h, i):
            seen.append((float(s[0]), np.asarray(x)))
            if guidance == 1:
                return nets["net"](x, s, labels)
            return guided(x, s, on=True if on is None else bool(on[i]))

        drawn = sampler.tables.before != 0
        noises = iter(nhwc(z["step_noise"]))

        def noise_fn(j):
            return jnp.asarray(nhwc(z["noise"]) if j == len(sampler) else next(noises) if drawn[-1 - j] else 0.0)

        state = sampler.init(noise_fn)
        for i in range(len(sampler)):
            state = sampler.step(model, state, i, noise_fn)
        return sampler.result(state), seen, int(drawn.sum())

    for case in text(z, "cases"):
        ratios = solvers.edm_ratios(case["num_steps"], case["sigma_min"], case["sigma_max"], case["rho"])
        churn = dict(churn=case["S_churn"], churn_min=case["S_min"], churn_max=float(case["S_max"]))
        sampler = TableSampler(solvers.edm(Denoiser(), ratios, churn_noise=case["S_noise"], **churn))
        out, seen, used = run(sampler, case["guidance"])
        assert used == case["noises_used"]
        close(out, nhwc(z[f"{case['key']}:out"]), 1e-5, case["key"])
        close(sampler.times, z[f"{case['key']}:sigma_calls"], 1e-12, case["key"])
        close(np.stack([x for _, x in seen]), nhwc(z[f"{case['key']}:x_calls"]), 1e-5, case["key"])
    for key in z.files:
        if key.startswith("interval:") and key.endswith(":out"):
            key = key.removesuffix(":out")
            _, steps, scale, bounds = key.split(":")
            low, high = map(int, bounds.split("-"))
            sampler = TableSampler(solvers.edm(Denoiser(), solvers.edm_ratios(int(steps), 0.002, 80.0)))
            on = (sampler.steps >= low) & (sampler.steps <= high)
            out, *_ = run(sampler, float(scale), on)
            close(out, nhwc(z[f"{key}:out"]), 1e-5, key)
            close(sampler.times, z[f"{key}:sigma_cond_calls"], 1e-12, key)
            close(sampler.times[on], z[f"{key}:sigma_uncond_calls"], 1e-12, key)


# Guidance.


def test_guidance_of_a_given_output():
    z = flow_file("guidance")
    out = nhwc(z["model_output"])
    half, colors = len(out) // 2, out.shape[-1] // 2
    x, t, y = jnp.zeros((half, *out.shape[1:-1], colors)), jnp.zeros(half), jnp.arange(half)

    def given(x, t, y):
        return jnp.asarray(out[: len(x)])

    for scale in z["scales"]:
        scale = float(scale)
        close(guide(given, y, 0, scale)(x, t), nhwc(z[f"dit:{scale}"])[:half], 2e-7)
        close(guide(given, y, 0, scale)(x, t)[..., :colors], nhwc(z[f"sit:{scale}"])[:half], 2e-7)
        close(guide(given, y, 0, scale, channels=0)(x, t)[..., :colors], nhwc(z[f"diffusers:{scale}"])[:half], 2e-7)
        lerp = guide(given, y, 0, scale, channels=0, reference=lambda x, t, y: jnp.asarray(out[half:]))
        close(lerp(x, t)[..., :colors], nhwc(z[f"edm2:{scale}"])[:half], 2e-7)
        for start in z["interval_start"]:
            for time, golden in zip(z["t"], nhwc(z[f"lightning:{scale}:start{start}"])):
                on = jnp.asarray(bool(np.float32(time) >= start))
                close(guide(given, y, 0, scale)(x, t, on=on)[..., :colors], golden[:half], 2e-7)


def test_guidance_in_an_interval_as_repa_does_it():
    z = flow_file("guidance")
    a, points = text(z, "toy"), int(z["repa:num_steps"])
    y, noise = jnp.asarray(z["repa:y"]), nhwc(z["repa:z"])

    def velocity(x, t, y):
        label = jnp.cos(y.astype(jnp.float32)).reshape(-1, 1, 1, 1)
        v = (a["a"] * x * jnp.cos(a["b"] * column(t)) + a["c"] + 0.5 * label) * (1 - column(t) / 2)
        return v

    for case in text(z, "repa:cases"):
        key, scale, kind = case["key"], case["cfg_scale"], case["kind"]
        reversed_time = kind == "euler_maruyama"  # our SDE runs in SiT's time
        if reversed_time:
            parts = [catalog.make("sde_euler:form=sigma,last=mean,last_size=0.04", Flow(), points)]
        else:
            times = solvers.flow_times(1.0, 0.0, points)
            method = "euler" if kind == "euler" else "heun"
            parts = [solvers.runge_kutta(MeanFlow(), method, times if kind == "euler" else times[:-1])]
            if kind == "heun":  # their last step is Euler's
                parts.append(solvers.runge_kutta(MeanFlow(), "euler", times[-2:]))
            parts = [TableSampler(tables) for tables in parts]
        x, calls, flags = noise, [], []
        for sampler in parts:
            time = 1 - sampler.times if reversed_time else sampler.times
            first = time[np.searchsorted(sampler.steps, sampler.steps)]
            on = (first >= case["guidance_low"]) & (first <= case["guidance_high"]) & (scale > 1)
            calls, flags = [*calls, *time], [*flags, *on]

            def network(x, t, y, sign=-1 if reversed_time else 1):
                return sign * velocity(x, 1 - t if reversed_time else t, y)

            guided = guide(network, y, 1000, scale, channels=0)
            found = states(sampler, lambda x, t, h, i: guided(x, t, on=bool(on[i])), x, nhwc(z["repa:noise"]))
            x = found[-1]
        close(np.array(calls), z[f"{key}:t_calls"], 2e-6, key)
        assert flags == z[f"{key}:guided_calls"].tolist(), key
        close(x, nhwc(z[key]), 2e-6, key)


# MeanFlow.


def meanflow(settings):
    guided = settings.get("guidance_eq", "cfg") == "cfg"
    return MeanFlow(
        time=settings.get("noise_dist", "logit_normal"),
        time_mean=settings["P_mean"],
        time_std=settings["P_std"],
        instantaneous=settings["data_proportion"],
        omega=settings["omega"] if guided else 1.0,
        kappa=settings["kappa"] if guided else 0.0,
        t_start=settings.get("t_start", 0.0),
        t_end=settings.get("t_end", 1.0),
        norm_p=settings["norm_p"],
        norm_eps=settings["norm_eps"],
    )


def test_meanflow_losses_of_an_analytic_network():
    z = flow_file("meanflow_loss")
    x, noise, labels = nhwc(z["x"]), nhwc(z["noise"]), jnp.asarray(z["labels"])
    for case, settings in text(z, "settings").items():
        flow = meanflow(settings)
        draws = "uniform" if flow.time == "uniform" else "normal"
        t, r = flow.times(jnp.asarray(z[f"{draws}_t"]), jnp.asarray(z[f"{draws}_r"]))
        close(t, z[f"{case}:t"], 2e-6, case)
        close(r, z[f"{case}:r"], 2e-6, case)
        dropped, null = (
            drop_first(jnp.asarray(z["uniform_drop"]), settings["class_dropout_prob"]),
            int(z["num_classes"]),
        )
        assert np.array_equal(jnp.where(dropped, null, labels), z[f"{case}:y_inp"])

        def run(p):
            def u(x, t, h, y):
                wave = p[1] * x + p[2] * column(t) + p[3] * column(h) + 0.4 * jnp.sin(1.0 + column(y))
                return p[0] * jnp.sin(wave) + p[4] * x * column(h) + p[5] * column(t) * jnp.cos(x)

            losses = meanflow_losses(flow, u, x, labels, dropped, null, t, r, noise)
            return losses["loss"].mean(), losses

        (loss, losses), grad = jax.value_and_grad(run, has_aux=True)(jnp.asarray(z["theta"], jnp.float32))
        close(loss, z[f"{case}:loss"], 3e-6, case)
        close(losses["weight"], z[f"{case}:adp_wt"], 3e-6, case)
        close(losses["mse"], z[f"{case}:v_loss"], 3e-6, case)
        close(grad, z[f"{case}:grad_theta"], 3e-6, case)


def test_meanflow_sampling_of_an_analytic_network():
    z = flow_file("meanflow_sample")
    p, y = z["theta"], float(z["label"])

    def u(x, t, h, i):
        wave = p[1] * x + p[2] * column(t) + p[3] * column(h) + 0.4 * np.sin(1.0 + y)
        return p[0] * jnp.sin(wave) + p[4] * x * column(h) + p[5] * column(t) * jnp.cos(x)

    for case in text(z, "cases"):
        # Without times of their own, all steps but the first are of length 0 there.
        times = np.array(case["sampling_timesteps"] or [1.0, *[0.0] * case["num_steps"]])
        sampler = TableSampler(solvers.average_velocity(MeanFlow(), times))
        close(states(sampler, u, nhwc(z["z"]))[-1], nhwc(z[case["key"]]), 3e-6, case["key"])
    assert np.array_equal(catalog.make("meanflow", MeanFlow(), 2).times, [1.0, 0.5])


def test_average_after_the_loop_is_the_samplers_loop():
    """samplers.sample, the compiled loop, makes what the steps one by one make."""
    z = flow_file("sit_sde_toy")
    noise, step_noise = jnp.asarray(nhwc(z["z"])), jnp.asarray(nhwc(z["noise"]))
    for name, objective, steps in (("sde_heun", Flow(), 2 * len(step_noise) + 1), ("unipc:order=3", DDPM(), 6)):
        sampler = catalog.make(name, objective, steps)

        def noise_fn(j):
            return jax.random.normal(jax.random.fold_in(jax.random.key(0), j), noise.shape)

        def model(x, t, h, i):
            return jnp.tanh(x) + 0.1 * column(t)

        out = jax.jit(lambda: samplers.sample(sampler, model, noise_fn))()
        state = sampler.init(noise_fn)
        for i in range(len(sampler)):
            state = sampler.step(model, state, i, noise_fn)
        close(out, np.asarray(sampler.result(state)), 1e-5, name)


def test_meanflow_through_a_network(golden):
    """u and its derivative along a tangent, a whole loss with its gradients, one and two steps."""
    z = flow_file("meanflow_net")
    args, graphdef, params = meanflow_network(z, golden)

    def u(params, x, t, h, y):
        return nnx.merge(graphdef, params)(x, t, y, h)

    @jax.jit
    def derivative(params, x, t, r, y, v):
        one = jnp.ones_like(t)
        return jax.jvp(lambda x, t, h: u(params, x, t, h, y), (x, t, t - r), (v, one, one))

    value, du_dt = derivative(params, nhwc(z["x"]), z["t"], z["r"], z["y"], nhwc(z["v"]))
    close(value, nhwc(z["u"]), 1e-5, "u")
    close(du_dt, nhwc(z["du_dt"]), 1e-5, "du_dt")

    flow, rate = meanflow(text(z, "loss:settings")), text(z, "loss:settings")["class_dropout_prob"]
    t, r = flow.times(jnp.asarray(z["loss:normal_t"]), jnp.asarray(z["loss:normal_r"]))
    close(t, z["loss:t"], 2e-6)
    close(r, z["loss:r"], 2e-6)
    dropped, null, labels = drop_first(jnp.asarray(z["loss:uniform_drop"]), rate), args["num_classes"], z["loss:labels"]
    assert np.array_equal(jnp.where(dropped, null, labels), z["loss:y_inp"])

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss_fn(params):
        x, noise = nhwc(z["loss:x"]), nhwc(z["loss:noise"])
        losses = meanflow_losses(flow, partial(u, params), x, jnp.asarray(labels), dropped, null, t, r, noise)
        return losses["loss"].mean(), losses

    (loss, losses), grads = loss_fn(params)
    close(loss, z["loss:loss"], 1e-5)
    close(losses["weight"], z["loss:adp_wt"], 1e-5)
    close(losses["mse"], z["loss:v_loss"], 1e-5)
    grads = published.to_published(grads, args)
    for key in z.files:
        if key.startswith("loss:grad:"):
            close(grads[key.removeprefix("loss:grad:")], z[key], 2e-5, key)

    y = jnp.asarray(z["sample:y"])
    network = jax.jit(partial(u, params))
    for key in z.files:
        if key.startswith("sample:") and "," in key:
            times = np.array([float(part) for part in key.removeprefix("sample:").split(",")])
            sampler = TableSampler(solvers.average_velocity(MeanFlow(), times))
            found = states(sampler, lambda x, t, h, i: network(x, t, h, y), nhwc(z["sample:z"]))
            close(found[-1], nhwc(z[key]), 1e-5, key)


def meanflow_network(z, golden):
    """(arguments, graphdef, params) of network "a" with the arrays of the file added or replaced."""
    flat = dict(weight_files.read(str(GOLDEN / "dit" / "dit_a_weights.npz")))
    prefix = "weight:"
    flat |= {key.removeprefix(prefix): z[key] for key in z.files if key.startswith(prefix)}
    args = published.infer_args(flat, num_heads=text(z, "geometry")["num_heads"])
    return args, dit.abstract(**args)[0], published.from_published(flat, args)


def test_likelihood_on_a_toy():
    """Its Jacobian is diagonal: every draw of signs gives the same divergence."""
    z = flow_file("sit_likelihood_toy")
    a, x, tested = text(z, "toy"), nhwc(z["x"]), 0

    def velocity(x, t):
        return a["a"] * x * jnp.cos(a["b"] * column(t)) + a["c"]

    for key in z.files:
        method, *points = key.removesuffix(":logp").split(":")
        if not key.endswith(":logp") or method not in METHODS:
            continue
        steps = int(points[0]) - 1
        value, latent = log_likelihood(Flow(), velocity, x, jax.random.key(steps), steps, METHODS[method])
        close(value, z[key], 1e-6, key)
        close(latent, nhwc(z[key.replace("logp", "latent")]), 2e-6, key)
        tested += 1
    value, _ = log_likelihood(Flow(), velocity, x, jax.random.key(0), 64, "rk4")
    close(value, z["dopri5_tight:logp"], 1e-6)
    assert tested > 2


# Averages of EDM2.


@pytest.fixture(scope="module")
def z():
    return flow_file("phema")


def near(value, golden, tolerance=1e-12, **settings):
    assert_allclose(value, golden, rtol=0, atol=tolerance * np.abs(golden).max(), **settings)


def betas(z):
    with np.errstate(divide="ignore"):
        return averages.beta(z["stds"], z["cur_nimg"][:, None] / z["batch_size"])


def test_exponents_and_decays(z):
    near(averages.exponent(z["std"]), z["exponent"])
    near(averages.exponent(z["stds"]), z["stds_exponent"])
    near(averages.std_of(z["std_of_exponent_in"]), z["std_of_exponent_out"])
    near(averages.std_of(averages.exponent(z["std"])), z["std"])
    near(betas(z), z["beta"])
    assert not betas(z)[0].any()


def test_response(z):
    """The exponent is that of the weights of the steps. The file does not say where a response ends."""
    for gamma, golden in zip(averages.exponent(z["stds"]), z["response_101"].T):
        last = np.flatnonzero(golden)[-1]
        response = np.where(np.arange(len(golden)) <= last, (np.arange(len(golden)) / last) ** gamma, 0)
        near(response / response.sum(), golden)


def traditional_decays(z):
    """Of an EMA whose half-life grows with the images seen, as far as a constant."""
    settings = json.loads(str(z["traditional_settings"]))
    halflife = np.full(len(z["cur_nimg"]), settings["halflife_Mimg"] * 1e6)
    if settings["rampup_ratio"] is not None:
        halflife = np.minimum(halflife, z["cur_nimg"] * settings["rampup_ratio"])
    return 0.5 ** (z["batch_size"] / halflife)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-12), (jnp.float32, 2e-6)], ids=["float64", "float32"])
def test_the_training_step_tracks(z, dtype, tolerance):
    """The updates of a run whose only parameter follows the signal."""
    to_signal = optax.GradientTransformation(lambda params: (), lambda to, state, params: (to - params, state))

    @jax.jit
    def step(state, signal, decay):
        return update(state, signal, {}, to_signal, decay)[0]

    with jax.enable_x64(dtype == jnp.float64):
        signal, zero = jnp.asarray(z["signal"], dtype), jnp.zeros((), dtype)
        names = [configs.average_name(std) for std in z["stds"]]
        state = TrainState(jnp.int32(0), signal[0], signal[0], (), {name: zero for name in names})
        tracked, ema = [], []
        for value, decay in zip(signal[1:], jnp.asarray(traditional_decays(z), dtype)):
            state = step(state, value, decay)
            tracked.append([state.averages[name] for name in names])
            ema.append(state.ema)
        near(np.array(tracked), z["ema"], tolerance)
        near(np.array(ema), z["traditional_ema"], tolerance)


def test_reconstruction(z):
    times, stds = z["snapshot_nimg"], z["snapshot_std"]
    products = averages.inner_product(times[:, None], stds[:, None], times, stds)
    near(products, z["correlation_of_snapshots"])
    cases = {int(key.split(":")[1]) for key in z if key.endswith(":coefficients")}
    assert cases
    for images in cases:
        used = times <= images
        fits = [averages.coefficients(times[used], stds[used], images, std) for std in z["posthoc:targets"]]
        fit = np.stack([coefficients for coefficients, _ in fits], axis=1)
        near(fit, z[f"posthoc:{images}:coefficients"], err_msg=str(images))
        assert_allclose(fit.sum(0), 1, rtol=1e-12)
        made = fit.T @ z["snapshot_value"][used]
        near(made, z[f"posthoc:{images}:value"])
        # What is tracked comes back. Another width is as near to what tracking it gives as its profile is to the exact
        # one, by the inequality of Cauchy and Schwarz.
        largest = np.abs(z["signal"]).max()
        targets = zip(z["posthoc:targets"], made, fits, z[f"posthoc:{images}:tracked_value"])
        for std, value, (_, distance), tracked in targets:
            norm = np.sqrt(averages.inner_product(images, std, images, std) * images)
            if std in stds[times == images]:
                assert distance < 1e-6
            assert abs(value - tracked) <= distance * norm * largest + 1e-9, std


# Networks with weights of the published names.


def run_network(args, params, *inputs):
    graphdef = dit.abstract(**args)[0]
    return np.asarray(jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))(params, *inputs))


def without_variance(flat, args):
    """The published arrays with the first C channels of the head."""
    p, c, end = args["patch_size"], args["in_channels"], {}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        head = flat[name].reshape(p, p, 2 * c, -1)[:, :, :c]
        end[name] = head.reshape(p * p * c, *flat[name].shape[1:])
    return flat | end


def test_sits_network_is_dits_at_times_that_are_no_integers(network):
    args, _, params, flat = network("a")
    z = flow_file("sit_net")
    assert json.loads(str(z["geometry"])) == args
    x, t, y, channels = nhwc(z["x"]), z["t"], z["y"], args["in_channels"]
    out = run_network(args, params, x, t, y)
    near(out, nhwc(z["dit_out"]), 1e-5)
    near(out[..., :channels], nhwc(z["out"]), 1e-5)
    half, network = len(x) // 2, lambda x, *_: run_network(args, params, x, t, y)[..., :channels]
    for key in z:
        if key.startswith("cfg_"):
            guided = guide(network, y[:half], 0, float(key[4:]))  # times and labels are those of the doubled batch
            near(guided(x[:half], t[:half]), nhwc(z[key])[:half], 1e-5)
    small = without_variance(flat, args)
    inferred = published.infer_args(small, args["num_heads"])
    assert not inferred["learn_sigma"] and published.infer_args(flat, args["num_heads"])["learn_sigma"]
    out = run_network(inferred, published.from_published(small, inferred), x, t, y)
    assert out.shape == x.shape
    near(out, nhwc(z["out"]), 1e-5)


def test_times_are_embedded_as_they_are():
    z = flow_file("sit_net")
    frequencies = dit.timestep_frequencies(z["t"], z["t_embedding"].shape[1])
    assert_allclose(frequencies, z["t_embedding"], atol=1e-6)


def test_the_arrays_of_sits_files():
    models = json.loads(str(flow_file("sit_net")["state_dict_shapes"]))
    for name, shapes in models.items():
        model, _, option = name.partition(":")
        shapes = {key: tuple(shape) for key, shape in (models[model] | shapes).items()}
        args = published.infer_args({key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()})
        assert dit.model_args(model.replace("SiT", "DiT")).items() <= args.items()
        assert args["learn_sigma"] == (option != "learn_sigma=False") and not args["second_time"]
        ours = published.published_shapes(args)
        assert ours == shapes and list(ours) == list(shapes)


def test_meanflows_network(network):
    flat, z = network("a")[3], flow_file("meanflow_net")
    geometry = json.loads(str(z["geometry"]))
    flat = flat | {key.removeprefix("weight:"): z[key] for key in z if key.startswith("weight:")}
    args = published.infer_args(flat, geometry["num_heads"])
    assert geometry.items() <= args.items() and args["second_time"] and not args["learn_sigma"]
    params = published.from_published(flat, args)
    u = run_network(args, params, nhwc(z["x"]), z["t"], z["y"], z["t"] - z["r"])
    near(u, nhwc(z["u"]), 1e-5)
    back = published.to_published(params, args)
    assert back.keys() == flat.keys()
    for name, a in flat.items():
        assert_array_equal(back[name].view(np.uint32), a.view(np.uint32), err_msg=name)
