"""Averages of the weights whose width is chosen after training: beside EDM2's code, in a real run, as --which."""

import json
import os
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, ROOT, TINY, losses, one_error
from numpy.testing import assert_allclose, assert_array_equal

import dit_jax
from dit_jax import config as configs
from dit_jax.parallel import layout, sharding
from dit_jax.runtime.errors import UserError
from dit_jax.training import averages, initialize, setup
from dit_jax.training.step import TrainState, from_items, to_items, update
from dit_jax.weights import load, snapshots
from dit_jax.weights.checkpoint import Checkpoints

sys.path.insert(0, str(ROOT / "configs"))
ONE = sharding.make_mesh(devices=jax.devices()[:1])
STEPS, EVERY = 7, 2  # of the run below
KEPT = [2, 4, 6, 7]  # the steps of its snapshots
RUN = [*TINY, f"--config.steps={STEPS}", f"--config.average.every={EVERY}", "--config.checkpoint.every=1"]
TRACKED = {"std0.05": 0.05, "std0.1": 0.1}


@pytest.fixture(scope="module")
def z():
    return np.load(GOLDEN / "flow" / "phema.npz")


def close(value, golden, tolerance=1e-12, **settings):
    assert_allclose(value, golden, rtol=0, atol=tolerance * np.abs(golden).max(), **settings)


def betas(z):
    with np.errstate(divide="ignore"):
        return averages.beta(z["stds"], z["cur_nimg"][:, None] / z["batch_size"])


def test_exponents_and_decays(z):
    close(averages.exponent(z["std"]), z["exponent"])
    close(averages.exponent(z["stds"]), z["stds_exponent"])
    close(averages.std_of(z["std_of_exponent_in"]), z["std_of_exponent_out"])
    close(averages.std_of(averages.exponent(z["std"])), z["std"])
    close(betas(z), z["beta"])
    assert not betas(z)[0].any()


def test_response(z):
    """The exponent is that of the weights of the steps. The file does not say where a response ends."""
    for gamma, golden in zip(averages.exponent(z["stds"]), z["response_101"].T):
        last = np.flatnonzero(golden)[-1]
        response = np.where(np.arange(len(golden)) <= last, (np.arange(len(golden)) / last) ** gamma, 0)
        close(response / response.sum(), golden)


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
        close(np.array(tracked), z["ema"], tolerance)
        close(np.array(ema), z["traditional_ema"], tolerance)


def test_reconstruction(z):
    times, stds = z["snapshot_nimg"], z["snapshot_std"]
    products = averages.inner_product(times[:, None], stds[:, None], times, stds)
    close(products, z["correlation_of_snapshots"])
    cases = {int(key.split(":")[1]) for key in z if key.endswith(":coefficients")}
    assert cases
    for images in cases:
        used = times <= images
        fits = [averages.coefficients(times[used], stds[used], images, std) for std in z["posthoc:targets"]]
        fit = np.stack([coefficients for coefficients, _ in fits], axis=1)
        close(fit, z[f"posthoc:{images}:coefficients"], err_msg=str(images))
        assert_allclose(fit.sum(0), 1, rtol=1e-12)
        made = fit.T @ z["snapshot_value"][used]
        close(made, z[f"posthoc:{images}:value"])
        # What is tracked comes back. Another width is as near to what tracking it gives as its profile is to the exact
        # one, by the inequality of Cauchy and Schwarz.
        largest = np.abs(z["signal"]).max()
        targets = zip(z["posthoc:targets"], made, fits, z[f"posthoc:{images}:tracked_value"])
        for std, value, (_, distance), tracked in targets:
            norm = np.sqrt(averages.inner_product(images, std, images, std) * images)
            if std in stds[times == images]:
                assert distance < 1e-6
            assert abs(value - tracked) <= distance * norm * largest + 1e-9, std


def tiny(**changes):
    import digits

    c = digits.get_config()
    c.update_from_flattened_dict({"batch_size": 8, "model.depth": 2, "model.hidden_size": 32, **changes})
    return layout.resolve_auto(configs.resolve(c), jax.devices()[:1])


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    """The workdir of a run that tracks averages and saves every step."""
    workdir = tmp_path_factory.mktemp("averaged")
    status, _, err = command("train", *RUN, f"--workdir={workdir}")
    assert status == 0 and not err, err
    return workdir


def make(workdir, std, step=None):
    return averages.make(str(workdir), std, averages.snapshot_steps(str(workdir), step))


def arrays_of(path):
    return dict(snapshots.open_file(str(path))[1])


def snapshot(workdir, step):
    return arrays_of(snapshots.path_of(str(workdir), snapshots.SNAPSHOTS, step))


def params_of_every_step(workdir):
    """[{path: array in float64}] of the steps from 1."""
    checkpoints = Checkpoints(str(workdir), read_only=True)
    _, _, target = setup.make_programs(tiny(), ONE)
    trees = [checkpoints.restore_params(step, "params", target.params)[1] for step in range(1, STEPS + 1)]
    return [{name: np.float64(a) for name, a in snapshots.gathered(tree)} for tree in trees]


def test_a_run_tracks_what_its_checkpoints_average_to(run):
    """Equation 121 and the recursion of equation 127 in float64, on the parameters of every step."""
    assert snapshots.steps_of(str(run), snapshots.SNAPSHOTS) == KEPT
    every = params_of_every_step(run)
    by_hand = {std: every[0] for std in (0.05, 0.075, 0.1)}
    for updates, params in enumerate(every[1:], 2):
        for std, average in by_hand.items():
            beta = averages.beta(std, updates)
            by_hand[std] = {name: beta * average[name] + (1 - beta) * params[name] for name in params}
        if updates in KEPT:
            there = snapshot(run, updates)
            assert len(there) == 2 * len(params)
            for name, std in TRACKED.items():
                for leaf, value in by_hand[std].items():
                    assert_allclose(there[f"{name}/{leaf}"], value, rtol=1e-6, atol=1e-8, err_msg=leaf)
    moved = max(np.abs(by_hand[0.05][leaf] - by_hand[0.1][leaf]).max() for leaf in params)
    assert moved > 1e-4  # or equality would say little
    # A width that was not tracked is far nearer to its own average than to those that were.
    made = arrays_of(make(run, 0.075)[0])
    far = {std: max(np.abs(made[leaf] - average[leaf]).max() for leaf in made) for std, average in by_hand.items()}
    assert far[0.075] < 0.1 * min(far[0.05], far[0.1]), far


def test_a_tracked_width_is_the_tracked_average_to_the_bit(run):
    for step in (4, STEPS):
        there = snapshot(run, step)
        for name, std in TRACKED.items():
            path, made = make(run, std, step)
            assert made["distance"] < 1e-6 and made["steps"][-1] == step
            for leaf, value in arrays_of(path).items():
                assert_array_equal(value, there[f"{name}/{leaf}"])


def test_a_checkpoint_keeps_the_averages(run):
    config = tiny(**{"average.every": EVERY})
    _, _, target = setup.make_programs(config, ONE)
    items, _ = Checkpoints(str(run), read_only=True).restore_latest(to_items(target), lambda meta: None)
    state, there = from_items(items), snapshot(run, STEPS)
    assert int(state.step) == STEPS
    for name, value in snapshots.gathered(state.averages):
        assert_array_equal(value, there.pop(name))
    assert not there


@pytest.mark.slow
def test_killed_in_a_snapshot_the_run_ends_with_the_same_bytes(command, run, tmp_path):
    """SIGKILL amid the second snapshot, after some of its arrays."""
    kill = f"""
import os, signal
from dit_jax.weights import snapshots
add, calls = snapshots._add, []
def counted(*args):
    calls.append(args)
    if len(calls) == {len(snapshot(run, EVERY)) + 10}:
        os.kill(os.getpid(), signal.SIGKILL)
    add(*args)
snapshots._add = counted
"""
    status, _, _ = command("train", *RUN, f"--workdir={tmp_path}", code=kill)
    assert status == -signal.SIGKILL
    folder = tmp_path / "averages" / "snapshots"
    assert sorted(os.listdir(folder)) == ["00000002.npz", "00000004.npz.part"]
    status, out, err = command("train", *RUN, f"--workdir={tmp_path}")
    assert status == 0 and "resuming from step" in out, err
    assert sorted(os.listdir(folder)) == [f"{step:08d}.npz" for step in KEPT]
    for name in os.listdir(folder):
        assert (folder / name).read_bytes() == (run / "averages" / "snapshots" / name).read_bytes(), name
    assert losses(tmp_path) == losses(run)


def test_off_the_state_is_as_before():
    """No further array in the state, no item for a checkpoint; a checkpoint of before has a config without the section."""
    config = tiny()
    _, _, target = setup.make_programs(config, ONE)
    assert target.averages == {} and set(to_items(target)) == {"params", "ema", "optimizer"}
    _, _, tracking = setup.make_programs(tiny(**{"average.every": 5}), ONE)
    count = len(jax.tree.leaves(target.params))
    assert len(jax.tree.leaves(tracking)) == len(jax.tree.leaves(target)) + 2 * count
    old = {name: section for name, section in config.items() if name != "average"}
    assert configs.stored_problem(old) is None and configs.differences(old, config) == []
    assert from_items(to_items(target)) == target


def test_the_averages_are_sharded_like_the_parameters():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    _, _, target = setup.make_programs(tiny(**{"average.every": 5, "model.hidden_size": 128}), mesh)
    expected = sharding.shardings_of(target.params)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(expected))
    assert [sharding.shardings_of(average) for average in target.averages.values()] == [expected] * 2


def test_a_made_average_is_loaded_by_its_name(run):
    path, made = make(run, 0.2)
    model = dit_jax.load(run, which="std0.20")
    for name, value in snapshots.gathered(model.params):
        assert_array_equal(value, arrays_of(path)[name])
    meta, _ = snapshots.open_file(path)
    assert made["steps"] == KEPT and np.shape(made["coefficients"]) == (4, 2)
    average = {"of": ["std0.05", "std0.1"], "snapshots": 4, "distance": made["distance"]}
    for key, value in {"which": "std0.2", "step": STEPS, "sha256": meta["sha256"], "average": average}.items():
        assert model.origin[key] == value
    args = configs.dit_args(tiny())
    params, origin = initialize.initial_params(str(run), "std0.2", args=args, mesh=ONE, seed=0)
    assert origin == {"workdir": str(run), "step": STEPS, "which": "std0.2"}
    for name, value in snapshots.gathered(params):
        assert_array_equal(value, arrays_of(path)[name])


def test_what_is_not_made_is_refused_with_the_command_that_makes_it(run, tmp_path):
    for step, flag in ((None, "--std=0.15"), (4, "--std=0.15 --step=4")):
        with pytest.raises(UserError, match=f"no average std0.15.*dit_jax.average --workdir={run} {flag}"):
            load.load(str(run), ONE, which="std0.15", step=step)
    make(run, 0.03)
    with pytest.raises(UserError, match=r"std0.03 of step 4 \(made so far: 7\)"):
        load.load(str(run), ONE, which="std0.03", step=4)
    np.savez(tmp_path / "weights.npz", a=np.zeros(3, np.float32))
    with pytest.raises(UserError, match="has no average std0.1"):
        load.load(str(tmp_path / "weights.npz"), ONE, which="std0.1")
    for which in ("std", "std0", "std0.5", "std1", "stdx", "std-0.1", "std1e-2", "ema2"):
        with pytest.raises(UserError, match=f"which='{which}': must be ema or raw, or an average"):
            load.load(str(run), ONE, which=which)


def test_bad_snapshots_are_named(run, tmp_path):
    shutil.copytree(run / "averages" / "snapshots", tmp_path / "averages" / "snapshots")
    path = tmp_path / "averages" / "snapshots" / "00000006.npz"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    for damage in (bytes(changed), whole[: len(whole) // 2], b"", b"PK"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"00000006\.npz.* is it whole\?"):
            make(tmp_path, 0.075)
    assert not (tmp_path / "averages" / "std0.075").exists()
    arrays = list(snapshot(run, 6).items())
    meta = snapshots.open_file(str(run / "averages" / "snapshots" / "00000006.npz"))[0]
    snapshots.write(str(path), arrays[:-1], meta)
    with pytest.raises(UserError, match=r"00000006\.npz: holds other arrays"):
        make(tmp_path, 0.075)
    snapshots.write(str(path), arrays, meta | {"config": {}})
    with pytest.raises(UserError, match=r"00000006\.npz: its meta has no config.seed"):
        make(tmp_path, 0.075)
    make(tmp_path, 0.075, 4)  # those before are not in the way


def test_steps_that_a_run_takes_again_lose_their_files(tmp_path, capsys):
    for kind, step in (("snapshots", 4), ("snapshots", 8), ("std0.1", 4), ("std0.1", 8)):
        snapshots.write(snapshots.path_of(str(tmp_path), kind, step), [("a", np.zeros(2, np.float32))], {})
    snapshots.remove_later(str(tmp_path), 5)
    assert [snapshots.steps_of(str(tmp_path), kind) for kind in ("snapshots", "std0.1")] == [[4], [4]]
    assert "2 file(s) of steps after 5 removed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"average.every": -1}, "average.every=-1: must be 0 or more"),
        ({"average.narrow": 0.0}, "average.narrow=0.0: must be between 0.001 and 0.288"),
        ({"average.wide": 0.5}, "average.wide=0.5: must be between"),
        ({"average.every": 5, "average.wide": 0.05}, "average.narrow=0.05: must be less than average.wide=0.05"),
        ({"init.which": "std0.4"}, "init.which='std0.4': must be ema or raw, or an average"),
    ],
    ids=str,
)
def test_bad_config_is_refused_naming_the_field(changes, words):
    with pytest.raises(UserError, match=words):
        tiny(**changes)


def test_the_command(command, run):
    status, out, err = command("average", f"--workdir={run}", "--std=0.12")
    assert status == 0 and not err and "--which=std0.12" in out and "snapshots of 4 steps, 2 to 7" in out, err
    assert (run / "averages" / "std0.12" / "00000007.npz").exists()


@pytest.mark.slow
def test_bad_flags_get_one_line(command, run, uninterrupted):
    off = {name for name in os.listdir(uninterrupted / "checkpoints" / "24") if "." not in name and name[0] != "_"}
    assert off == {"params", "ema", "optimizer", "meta"} and not (uninterrupted / "averages").exists()
    one_error(command("average", f"--workdir={uninterrupted}", "--std=0.1"), "no snapshots", "--config.average.every")
    one_error(command("average", f"--workdir={run}", "--std=0.3"), "--std=0.3: must be between 0.001 and 0.288")
    one_error(command("average", f"--workdir={run}", "--std=0.1", "--step=5"), "--step=5", "2, 4, 6, 7")
    one_error(command("average", f"--workdir={run}"), "--std")
    one_error(command("average", "--std=0.1"), "--workdir")
    one_error(command("sample", f"--workdir={run}", "--which=std0.11"), "dit_jax.average", "--std=0.11")
    one_error(command("convert", f"--workdir={run}", "--which=mean", "--out=w.npz"), "--which=mean", "ema or raw")
    one_error(command("train", *RUN, f"--workdir={run}", "--config.average.every=0"), "average.every (2 there, 0 here)")
    one_error(
        command("train", *TINY, "--config.average.every=4", "--config.steps=24", f"--workdir={uninterrupted}"),
        "average.every (0 there, 4 here)",
    )


@pytest.mark.slow
def test_the_other_commands_take_an_average(command, run, tmp_path):
    """sample, convert, and a run that starts from it."""
    path, _ = make(run, 0.06)
    flags = [f"--workdir={run}", f"--out={tmp_path}/samples", "--num=2", "--cfg_scale=1", "--sampler=ddim", "--steps=2"]
    status, _, err = command("sample", *flags, "--which=std0.06")
    assert status == 0, err
    manifest = json.loads((tmp_path / "samples" / "manifest.json").read_text())
    assert manifest["which"] == "std0.06" and manifest["average"]["snapshots"] == len(KEPT)
    status, _, err = command("convert", f"--workdir={run}", "--which=std0.06", f"--out={tmp_path}/w.npz")
    assert status == 0, err
    from dit_jax.weights import files, published

    params = published.from_published(files.read(str(tmp_path / "w.npz")), configs.dit_args(tiny()))
    for name, value in snapshots.gathered(jax.tree.map(jnp.asarray, params)):
        assert_array_equal(value, arrays_of(path)[name])
    start = [f"--config.init.weights={run}", "--config.init.which=std0.06", "--config.average.every=1"]
    status, out, err = command("train", *TINY, "--config.steps=1", *start, f"--workdir={tmp_path}/tuned")
    assert status == 0 and "which std0.06" in out, err
    # The initial weights have no part in an average: after one step it is the parameters.
    _, _, target = setup.make_programs(tiny(), ONE)
    _, params, _ = Checkpoints(str(tmp_path / "tuned"), read_only=True).restore_params(1, "params", target.params)
    there = snapshot(tmp_path / "tuned", 1)
    for name, value in snapshots.gathered(params):
        assert_array_equal(there[f"std0.1/{name}"], value)


@pytest.mark.slow
def test_a_mesh_tracks_the_same_averages(command, run, tmp_path):
    flags = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", f"--workdir={tmp_path}"]
    status, _, err = command("train", *RUN, *flags, devices=4)
    assert status == 0, err
    for name, value in snapshot(tmp_path, STEPS).items():
        assert_allclose(value, snapshot(run, STEPS)[name], atol=2e-4, err_msg=name)
