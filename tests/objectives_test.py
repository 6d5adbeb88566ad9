"""Flow matching and MeanFlow as a user runs them: training on any mesh, resume, sampling, guidance, refusals."""

import json
import signal
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, TOY, losses, one_error, records
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from train_test import tiny, wait_for

import dit_jax
from dit_jax.data import pipeline, sources
from dit_jax.diffusion import catalog
from dit_jax.diffusion.flow import FLOW_PREDICTIONS, Flow
from dit_jax.diffusion.guidance import guide
from dit_jax.diffusion.meanflow import MeanFlow
from dit_jax.diffusion.objectives import DDPM
from dit_jax.parallel import sharding
from dit_jax.runtime.errors import UserError
from dit_jax.sampling.generator import Settings, guided_steps, make_sampler
from dit_jax.training import setup
from dit_jax.weights import files

OBJECTIVES = {
    "flow": ["--config.objective=flow", "--config.sample.sampler=heun", "--config.sample.steps=4"],
    "meanflow": [
        "--config.objective=meanflow",
        *("--config.sample.sampler=meanflow", "--config.sample.steps=1", "--config.sample.cfg_scale=1"),
    ],
}


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    """run("flow") -> the directory of a run of 6 steps, whose weights are not all zero; it has the checkpoints 3 and 6."""
    made = {}

    def make(objective):
        if objective not in made:
            made[objective] = tmp_path_factory.mktemp(objective) / "run"
            flags = ["--config.steps=6", "--config.checkpoint.every=3", "--config.ema_decay=0.5"]
            done = command("train", *TINY, *flags, *OBJECTIVES[objective], f"--workdir={made[objective]}")
            assert done[0] == 0, done
        return made[objective]

    return make


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


CHANGES = {
    "ddpm-min-snr": {"diffusion.min_snr": 5.0},
    "flow": {"objective": "flow"},
    "flow-gvp-score": {"objective": "flow", "flow.path": "gvp", "flow.prediction": "score"},
    "flow-x_0": {"objective": "flow", "flow.prediction": "x_0", "sample.sampler": "euler"},
    "flow-direction": {"objective": "flow", "flow.direction": True, "flow.time": "logit_normal"},
    "meanflow": {"objective": "meanflow", "sample.sampler": "meanflow", "sample.cfg_scale": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_losses_fall_and_agree_on_every_mesh(name):
    config, across = tiny(**{"batch_size": 16, "model.remat": "none", **CHANGES[name]}), []
    source = sources.digits()[0]
    for devices, sizes in ((1, {}), (2, dict(data=2)), (4, dict(data=1, fsdp=2, tensor=2))):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices], **sizes)
        init, step, _ = setup.make_programs(config, mesh)
        state, values, split = init(jax.random.key(0)), [], sharding.batch_sharding(mesh)
        for s in range(60 if devices == 1 else 12):
            batch = pipeline.global_batch(source, s, seed=0, flip=False, batch_size=16, sharding=split)
            state, metrics = step(state, batch)
            values.append([float(metrics[key]) for key in ("grad_norm", "loss", "mse") if key in metrics])
        across.append(np.array(values))
    assert np.isfinite(across[0]).all() and across[0][:10, -1].mean() > across[0][-10:, -1].mean()
    for values in across[1:]:
        assert_allclose(values, across[0][:12], rtol=2e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_killed_and_resumed_the_run_ends_with_the_same_bits(command, objective, tmp_path):
    def flags(name):
        steps = ["--config.steps=24", "--config.checkpoint.every=4", f"--workdir={tmp_path / name}"]
        return [*TINY, *OBJECTIVES[objective], *steps]

    assert command("train", *flags("whole"))[0] == 0
    process = command("train", *flags("killed"), wait=False)
    wait_for((tmp_path / "killed/checkpoints/4").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    status, out, err = command("train", *flags("killed"))
    assert status == 0 and "from step" in out, err
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    arrays = []
    for name in ("killed", "whole"):
        path = tmp_path / f"{name}.npz"
        assert command("convert", f"--workdir={tmp_path / name}", "--which=raw", f"--out={path}")[0] == 0
        arrays.append(dict(files.read(str(path))))
    assert all(a.tobytes() == arrays[1][name].tobytes() for name, a in arrays[0].items())
    one_error(command("train", *flags("whole"), "--config.objective=ddpm"), "objective ('")
    field = "flow.path=vp" if objective == "flow" else "meanflow.kappa=0.1"
    one_error(command("train", *flags("whole"), f"--config.{field}"), field.partition("=")[0])


@pytest.mark.slow
def test_measured_while_it_trains(command, tmp_path):
    """config.eval gives the numbers that `evaluate` gives of the checkpoint, with a sampler of flow matching; and the
    closing measurement, and the training checkpoint in PyTorch's form. FID is by a small network."""
    pictures = np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
    np.savez(reference := tmp_path / "reference.npz", arr_0=pictures)
    measured = ["--config.eval.every=2", "--config.eval.num=12", "--config.eval.batch_size=5"]
    measured += [f"--config.eval.reference={reference}", "--config.eval.inception=toy", "--config.judge.samples=20"]
    flags = [*TINY, *OBJECTIVES["flow"], *measured, "--config.steps=4", "--config.sample.every=2"]
    status, out, err = command("train", *flags, f"--workdir={tmp_path}/run", code=TOY)
    assert status == 0 and "recognises" in out, err
    assert (tmp_path / "run/samples/00000004.png").exists() and (tmp_path / "run/report.json").exists()
    found = {r["step"]: r for r in records(tmp_path / "run") if "loss" not in r}
    assert sorted(found) == [2, 4] and found[2]["fid_12"] != found[4]["fid_12"]

    flags = ["--num=12", "--classes=balanced", "--sampler=heun", "--steps=4", "--cfg_scale=1", "--batch_size=5"]
    flags += [
        f"--reference={reference}",
        "--inception=toy",
        "--features_batch_size=12",
        f"--out={tmp_path}/report.json",
    ]
    done = command("evaluate", f"--workdir={tmp_path}/run", *flags, code=TOY)
    assert done[0] == 0, done[2]
    for name, value in json.loads((tmp_path / "report.json").read_text())["metrics"].items():
        assert_allclose(found[4][f"{name}_12"], value, rtol=1e-5, err_msg=name)
    if find_spec("torch"):
        for out, *flags in (("training.pt", "--training"), ("ema.npz",)):
            done = command("convert", f"--workdir={tmp_path}/run", f"--out={tmp_path}/{out}", *flags)
            assert done[0] == 0, done[2]
        one, two = (dict(files.read(f"{tmp_path}/{name}")) for name in ("training.pt", "ema.npz"))
        assert one.keys() == two.keys() and all(a.tobytes() == two[name].tobytes() for name, a in one.items())


@pytest.mark.parametrize(
    "objective, options",
    [
        ("flow", dict(sampler="unipc:order=3", steps=6, cfg_interval="0.2,0.9")),
        pytest.param("flow", dict(sampler="sde_heun:form=linear", steps=5, cfg_scale=3.0), marks=pytest.mark.slow),
        pytest.param("meanflow", {}, marks=pytest.mark.slow),
    ],
)
def test_the_api_and_the_command_make_the_same_pictures(run, command, mesh, tmp_path, objective, options):
    where, out = run(objective), tmp_path / str(len(list(tmp_path.iterdir())))
    flags = [f"--{name}={value}" for name, value in options.items()]
    status, _, err = command("sample", f"--workdir={where}", f"--out={out}", "--num=5", "--classes=3,7", *flags)
    assert status == 0, err
    model = dit_jax.load(where, mesh=mesh)
    images = model.sample(classes=[3, 7], num=5, progress=False, **options)
    assert_array_equal(images, np.load(out / "samples.npz")["arr_0"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["objective"]["name"] == objective
    assert manifest["sampler"] == options.get("sampler", "meanflow")
    assert images.std() > 0


def test_new_values_compile_nothing(run, mesh, compilations):  # noqa: F811
    model = dit_jax.load(run("flow"), mesh=mesh)
    options = dict(sampler="heun", steps=4, progress=False)
    first = model.sample([1], 4, cfg_interval=(0.0, 0.3), **options)
    compilations.clear()
    other = model.sample([3], 4, cfg_interval=(0.2, 1.0), cfg_scale=2.0, seed=1, **options)
    assert not compilations and np.abs(first.astype(int) - other).max() > 0


def test_outside_the_interval_nothing_is_guided_and_the_batch_is_not_doubled(run, mesh):
    model = dit_jax.load(run("flow"), mesh=mesh)
    options = dict(sampler="euler", steps=4, progress=False, latents=True)
    every = model.sample([1], 4, cfg_scale=3.0, **options)
    none = model.sample([1], 4, cfg_scale=1.0, **options)
    assert_allclose(model.sample([1], 4, cfg_scale=3.0, cfg_interval=(0.0, 1.0), **options), every, atol=1e-6)
    assert_allclose(model.sample([1], 4, cfg_scale=3.0, cfg_interval=(2.0, 3.0), **options), none, atol=1e-6)
    some = model.sample([1], 4, cfg_scale=3.0, cfg_interval=(0.5, 1.0), **options)
    assert np.abs(some - every).max() > 1e-4 and np.abs(some - none).max() > 1e-4
    sampler = make_sampler(Settings(sampler="heun", steps="8"), Flow())
    # Times 0, 1/4, 1/2, 3/4: both evaluations of a step follow its first time.
    assert guided_steps("0.25,0.5", sampler).tolist() == [False, False, True, True, True, True, False, False]

    sizes = []

    def network(x, t, y):
        sizes.append(len(x))
        return x

    guided = guide(network, jnp.arange(3), 9, 2.0)
    program = jax.make_jaxpr(lambda x, on: guided(x, jnp.zeros(3), on=on))(jnp.ones((3, 2, 2, 1)), True)
    assert sorted(sizes) == [3, 6] and [eqn.primitive.name for eqn in program.eqns].count("cond") == 1


@pytest.mark.slow
def test_autoguidance_by_an_earlier_checkpoint(run, command, mesh, tmp_path):
    where = run("flow")
    flags = ["--sampler=euler", "--steps=1", "--cfg_scale=2", "--cfg_channels=0", "--num=3", "--classes=2"]
    out = tmp_path / "guided"
    done = command("sample", f"--workdir={where}", f"--guide={where}", "--guide_step=3", f"--out={out}", *flags)
    assert done[0] == 0, done
    assert json.loads((out / "manifest.json").read_text())["guide"]["step"] == 3
    samples = []
    for step in (6, 3):
        model = dit_jax.load(where, mesh=mesh, step=step)
        options = dict(classes=[2], num=3, sampler="euler", steps=1, cfg_scale=1.0, latents=True, progress=False)
        samples.append(model.sample(**options))
    guided = dit_jax.load(where, mesh=mesh, guide=where, guide_step=3)
    options = dict(classes=[2], num=3, sampler="euler", steps=1, cfg_scale=2.0, cfg_channels=0, progress=False)
    # One step of Euler is linear in the velocity, so it can be checked outside.
    assert_allclose(guided.sample(latents=True, **options), 2 * samples[0] - samples[1], atol=1e-5)
    assert_array_equal(guided.sample(**options), np.load(out / "samples.npz")["arr_0"])
    one_error(command("sample", f"--workdir={where}", "--guide_step=3", f"--out={out}x", *flags), "--guide_step")
    other = run("meanflow")
    one_error(command("sample", f"--workdir={where}", f"--guide={other}", f"--out={out}x", *flags), "--guide")


@pytest.mark.parametrize(
    "objective, options, words",
    [
        ("flow", dict(sampler="ddpm"), "sampler=ddpm: does not fit the objective flow; use one of dpmpp_2m"),
        ("meanflow", dict(sampler="unipc"), "does not fit the objective meanflow; use one of euler, heun"),
        ("flow", dict(sampler="heun", steps=7), "steps=7: this sampler evaluates the network 6, 8, .. times"),
        ("flow", dict(sampler="edm", steps=8), "steps=8: this sampler evaluates the network 7, 9, .. times"),
        ("flow", dict(sampler="heun", steps="4,5"), "steps='4,5': must be a number"),
        ("flow", dict(sampler="unipc:order=9"), "order='9': must be one of 1, 2, 3"),
        ("flow", dict(sampler="unipc:order=2,order=3"), "order is given twice"),
        ("flow", dict(sampler=5), "sampler=5: must be a text"),
        ("flow", dict(cfg_interval=None), "cfg_interval=None: must be a text"),
        ("flow", dict(sampler="unipc", steps="9" * 5000), "must be a number of evaluations"),
        ("flow", dict(sampler="unipc", steps=4, eta=0.5), "eta=0.5: is the noise of ddim"),
        ("flow", dict(sampler="edm:sigma_max=1e300", steps=9), "no finite steps"),
        ("flow", dict(sampler="unipc:x=1"), "no option 'x'; it has order, solver, spacing"),
        ("flow", dict(sampler="unipc:spacing=karras", steps=5), "spacing=karras: is of ddpm"),
        ("flow", dict(sampler="sde_euler:form=SBDM", steps=5), "no finite steps"),
        ("flow", dict(sampler="euler:shift=-1", steps=5), "shift=-1: must be between"),
        ("flow", dict(cfg_interval="x", steps=4), "cfg_interval='x': must be LOW,HIGH"),
        ("flow", dict(cfg_interval=(0.5, 0.1), steps=4), "cfg_interval='0.5,0.1'"),
        ("flow", dict(cfg_interval=(0, 1), cfg_scale=1.0), "cfg_interval=0,1: is for guidance"),
        ("meanflow", dict(cfg_scale=2.0), "cfg_scale=2.0: sampler=meanflow is guided by what was trained in"),
    ],
)
def test_what_does_not_fit_is_one_line(run, mesh, objective, options, words):
    model = dit_jax.load(run(objective), mesh=mesh)
    with pytest.raises(UserError) as e:
        model.sample(num=2, progress=False, **options)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"objective": "x"}, "objective='x': must be one of ddpm, flow, meanflow"),
        ({"objective": "flow", "flow.path": "x"}, "flow.path='x': must be one of linear, gvp, vp"),
        ({"objective": "ddpm", "model.learn_sigma": False}, "model.learn_sigma=False"),
        ({"objective": "meanflow", "diffusion.label_dropout": 0.0, "sample.cfg_scale": 1.0}, "guidance needs classes"),
        ({"objective": "flow", "flow.direction": True, "flow.prediction": "score"}, "flow.direction=True"),
        ({"meanflow.t_start": 0.9, "meanflow.t_end": 0.1}, "meanflow.t_start=0.9"),
        ({"sample.sampler": "x"}, "sample.sampler='x': must be one of ddpm, ddim"),
    ],
)
def test_fields_that_cannot_be_are_one_line(changes, words):
    with pytest.raises(UserError) as e:
        tiny(**changes)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "objective, count",
    [
        (Flow(), 25),
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in ((DDPM(), 61), (Flow("gvp", "score"), 61), (Flow("linear", "x_0"), 25), (MeanFlow(), 24))
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_sampler_brings_noise_to_the_data(objective, count):
    """With a network that is exact for Gaussian data."""
    mean, std = 0.5, 0.3

    def model(x, t, h, i):
        at = objective.levels(np.asarray(t[:1], np.float64))
        alpha, sigma = float(at.alpha[0]), float(at.sigma[0])
        noise = sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)  # E[epsilon | x]
        if objective.prediction == "noise":
            return jnp.concatenate([noise, jnp.zeros_like(noise)], axis=-1)
        if objective.prediction == "score":
            return -noise / sigma
        x_0 = mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        if objective.prediction == "x_0":
            return x_0
        return float(at.d_alpha[0]) * x_0 + float(at.d_sigma[0]) * noise

    for name in catalog.fitting(objective):
        if name == "meanflow":
            continue  # asks for the average velocity
        for steps in range(count, count - 4, -1):  # a number that the sampler allows
            try:
                sampler = catalog.make(name, objective, steps)
                break
            except UserError:
                continue
        assert len(sampler) == steps
        state = sampler.init(noise_fn := lambda j: jax.random.normal(jax.random.key(j), (64, 4, 4, 1)))
        for i in range(len(sampler)):
            state = sampler.step(model, state, i, noise_fn)
        out = np.asarray(sampler.result(state))
        assert abs(out.mean() - mean) < 0.03 and abs(out.std() - std) < 0.06, (objective, name, out.std())


def test_every_objective_has_a_sampler_by_default():
    for objective in (DDPM(), *(Flow(prediction=p) for p in FLOW_PREDICTIONS), MeanFlow()):
        name, steps = catalog.default(objective)
        assert len(catalog.make(name, objective, steps)) == int(steps)
    with pytest.raises(
        UserError, match="sampler=heun: does not fit the objective flow that predicts x_0; use one of dpmpp_2m"
    ):
        catalog.make("heun", Flow(prediction="x_0"), 10)


def test_n_steps_are_n_evaluations():
    """Also where the rounding of a spacing would add one."""
    for steps in (1, 2, 7, 61, 103, 250, 999):
        for spacing in ("linspace", "leading", "trailing", "karras", "lu"):
            sampler = catalog.make(f"unipc:spacing={spacing}", DDPM(), steps)
            assert len(sampler) == steps and sampler.times.min() >= 0
        for spacing in ("leading", "trailing"):
            sampler = catalog.make(f"ddim:spacing={spacing}", DDPM(), steps)
            assert len(sampler) == steps and sampler.times.min() >= 0
    for shift in (0.1, 1.0, 3.0):  # many steps, of which none must be empty
        assert catalog.make(f"dpmpp_3m:shift={shift}", Flow("vp", "noise"), 1000).tables.finite
    with pytest.raises(UserError, match="no finite steps"):
        catalog.make("edm:sigma_max=10000", Flow("vp"), 9)


def test_an_interval_holds_its_bounds_and_a_wrong_one_is_refused_before_training(capsys):
    sampler = make_sampler(Settings(sampler="euler", steps="10"), Flow())
    assert guided_steps("0,0.3", sampler).tolist() == [True] * 4 + [False] * 6  # 0.30000000000000004 is 0.3
    config = tiny(**{"sample.sampler": "ddim", "sample.cfg_interval": "9,1"})
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    target = setup.make_programs(config, mesh)[2]
    with pytest.raises(UserError, match="cfg_interval='9,1'"):
        setup.make_generator(config, mesh, target)
    config["sample"]["cfg_interval"] = "0.5,0.6"  # ddim has whole timesteps
    setup.make_generator(config, mesh, target)
    assert "cfg_interval=0.5,0.6: no step begins there, so nothing is guided" in capsys.readouterr().out


def test_times_are_drawn_in_their_range():
    flow = Flow(time="logit_normal", time_mean=0.7, time_low=0.2, time_high=0.6)
    draw = jax.jit(lambda key: flow.draw(key, key, jnp.zeros((40_000, 1)))["t"])
    t = np.asarray(draw(jax.random.key(0)))
    everywhere = Flow(time="logit_normal", time_mean=0.7).draw(
        jax.random.key(1), jax.random.key(1), jnp.zeros((10**6, 1))
    )
    kept = np.asarray(everywhere["t"])
    kept = kept[(kept >= 0.2) & (kept <= 0.6)]
    assert 0.2 <= t.min() < 0.21 and 0.59 < t.max() <= 0.6 + 1e-6
    assert stats.ks_2samp(t, kept).pvalue > 0.01  # LightningDiT's way: what lies outside is thrown away
    with pytest.raises(UserError, match="flow.time_low=0.6: must be less than flow.time_high=0.6"):
        tiny(**{"flow.time_low": 0.6, "flow.time_high": 0.6})
    for changes in (
        {"flow.prediction": "noise", "flow.time_low": 0.9995},  # the path ends at 0.999
        {"flow.time": "logit_normal", "flow.time_mean": -30.0, "flow.time_low": 0.9},
    ):
        with pytest.raises(UserError, match="hardly a time is drawn between them"):
            tiny(objective="flow", **changes)


def test_meanflow_ignores_channels_of_the_variance():
    flow, x = MeanFlow(kappa=0.0), jnp.ones((4, 2, 2, 1))
    drawn = dict(
        t=jnp.full(4, 0.8), r=jnp.full(4, 0.3), noise=-x, label=jnp.arange(4), dropped=np.zeros(4, bool), null=9
    )
    networks = (lambda z, t, y, h: jnp.sin(z), lambda z, t, y, h: jnp.concatenate([jnp.sin(z), z], axis=-1))
    one, two = (flow.losses(network, x, drawn["label"], drawn)["loss"] for network in networks)
    assert_array_equal(one, two)
