"""The train command as a user runs it: resume, kills, meshes, bad input."""

import os
import re
import signal
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, losses, one_error
from numpy.testing import assert_allclose

from dit_jax import config as configs
from dit_jax.parallel import layout, sharding
from dit_jax.training import setup
from dit_jax.training.step import from_items, to_items
from dit_jax.weights.checkpoint import Checkpoints

sys.path.insert(0, str(ROOT / "configs"))


def tiny(**changes):
    import digits

    c = digits.get_config()
    c.update_from_flattened_dict({"batch_size": 8, "model.depth": 2, "model.hidden_size": 32, **changes})
    return layout.resolve_auto(configs.resolve(c), jax.devices()[:1])


def final_state(workdir):
    """Every array of the newest checkpoint, and its step."""
    config = tiny()
    _, _, target = setup.make_programs(config, sharding.make_mesh(devices=jax.devices()[:1]))
    items, _ = Checkpoints(str(workdir), read_only=True).restore_latest(to_items(target), lambda meta: None)
    state = from_items(items)
    return int(state.step), [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def same_bits(a, b):
    (step_a, a), (step_b, b) = final_state(a), final_state(b)
    return step_a == step_b and all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def wait_for(condition, process):
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.0005)


def test_killed_anywhere_the_run_ends_with_the_same_bits(command, uninterrupted, tmp_path):
    """SIGKILL in the middle of training, and again while a checkpoint is being written."""
    flags = [*TINY, "--config.steps=24", "--config.checkpoint.every=4", f"--workdir={tmp_path}"]
    checkpoints, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"

    def being_written():
        return checkpoints.exists() and any("tmp" in name for name in os.listdir(checkpoints))

    def step_reached(n):
        return metrics.exists() and metrics.read_text().count("\n") >= n

    for condition in (lambda: step_reached(6), lambda: step_reached(12) and being_written()):
        process = command("train", *flags, wait=False)
        wait_for(condition, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    status, out, err = command("train", *flags)
    assert status == 0 and "resuming from step" in out, err
    assert same_bits(tmp_path, uninterrupted)
    assert losses(tmp_path) == losses(uninterrupted)
    # Once more: there is nothing left to do.
    status, out, _ = command("train", *flags)
    assert status == 0 and "resuming from step 24 of 24" in out


@pytest.mark.slow
def test_damaged_checkpoints_fall_back_and_say_so(command, uninterrupted, tmp_path):
    flags = [*TINY, "--config.steps=8", "--config.checkpoint.every=4", f"--workdir={tmp_path}"]
    assert command("train", *flags)[0] == 0
    before = final_state(tmp_path)
    arrays = max((tmp_path / "checkpoints/8/params").rglob("d/*"), key=lambda p: p.stat().st_size)
    whole = arrays.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damage in (whole[:1000], b"", bytes(flipped)):
        target = max((tmp_path / "checkpoints/8/params").rglob("d/*"), key=lambda p: p.stat().st_size)
        target.write_bytes(damage)
        status, out, err = command("train", *flags)
        assert status == 0 and not err, err
        assert "checkpoints/8 cannot be read" in out and "resuming from step 4 of 8" in out
        step, arrays = final_state(tmp_path)
        assert step == 8 and all(a.tobytes() == b.tobytes() for a, b in zip(arrays, before[1]))
    assert len(os.listdir(tmp_path / "damaged")) == 3
    for step in (4, 8):
        (tmp_path / f"checkpoints/{step}/meta/metadata").write_bytes(b"")
    one_error(command("train", *flags), "none of the checkpoints can be read", tmp_path)


@pytest.mark.slow
def test_another_run_is_refused_naming_the_fields(command, uninterrupted):
    flags = [*TINY, "--config.steps=24", "--config.checkpoint.every=4", f"--workdir={uninterrupted}"]
    one_error(
        command("train", *flags, "--config.model.depth=3", "--config.seed=1"),
        "model.depth (2 there, 3 here)",
        "seed (0 there, 1 here)",
    )
    one_error(command("train", *flags, "--config.steps=20"), "steps=20", "already at step 24; set steps higher")
    status, out, err = command("train", *flags, "--config.log_every=5")
    assert status == 0 and "changed since the checkpoint: log_every 1 -> 5" in out, err


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(command, tmp_path):
    flags = [*TINY, "--config.steps=12", "--config.checkpoint.every=4", f"--workdir={tmp_path}"]
    assert command("train", *flags, "--config.steps=4")[0] == 0
    good = final_state(tmp_path)
    one_error(
        command("train", *flags, "--config.optimizer.learning_rate=1e30"),
        "the loss is",
        "last good checkpoint is step 4",
        "optimizer.learning_rate",
    )
    step, arrays = final_state(tmp_path)
    assert step == 4 and all(a.tobytes() == b.tobytes() for a, b in zip(arrays, good[1]))
    # Finite loss and gradient, but an update that is not: it must not be saved either.
    fresh = [*TINY, "--config.steps=4", "--config.checkpoint.every=1", f"--workdir={tmp_path}/fresh"]
    one_error(command("train", *fresh, "--config.optimizer.learning_rate=1e38"), "step 1", "no checkpoint was written")
    assert command("train", *fresh)[0] == 0


def test_damaged_metrics_are_read_up_to_the_damage(tmp_path):
    from dit_jax.training.metrics import read_records

    path = tmp_path / "metrics.jsonl"
    for tail in (b'{"step": 2, "lo', b"3\n", b"\xff\xfe\n", b""):
        path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + tail)
        assert read_records(str(path)) == [{"step": 1, "loss": 0.5}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, words",
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("def get_config():\n    raise RuntimeError('boom')", "boom"),
        ("def get_config():\n    return {}", "ConfigDict"),
    ],
    ids=["syntax", "empty", "raises", "dict"],
)
def test_broken_config_files_get_one_line(command, tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    one_error(command("train", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/w"), words, "c.py")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.model.name=DiT-M/2"], ["model.name", "DiT-M/2", "DiT-XL/2"]),
        (["--workdir="], ["--workdir is empty"]),
    ],
    ids=lambda v: v[0] if v and v[0].startswith("--") else "",
)
def test_unknown_model_and_empty_workdir(command, tmp_path, flags, words):
    one_error(command("train", *TINY, f"--workdir={tmp_path}", *flags), *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.model.dept=3"], ["unknown config field 'model.dept'", "model.depth"]),
        (["--config.sample.every=5", "--config.sample.steps=0"], ["config.sample: steps='0'"]),
        (["--noconfig.foo"], ["unknown config field 'foo'"]),
        (["--config.model.num_classes=9"], ["model.num_classes=9"]),
        (["--config.data.source=imagenet"], ["data.source='imagenet'"]),
        (["--config.mesh.tensor=3"], ["mesh", "1 device"]),
        (["--config.steps=many"], ["--config.steps=many"]),
        (["--workdir=README.md/x"], ["--workdir=README.md/x: cannot be written"]),
        (["--workdir=/proc/x"], ["--workdir=/proc/x: cannot be written"]),
        (["--config=configs/none.py"], ["configs/none.py: no such file"]),
        (["--work=x"], ["work"]),
        (["extra"], ["'extra'", "--flag=value"]),
    ],
    ids=lambda v: v[0] if v and v[0].startswith("--") else "",
)
def test_bad_input_gets_one_line(command, tmp_path, flags, words):
    one_error(command("train", *TINY, f"--workdir={tmp_path}", *flags), *words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"steps": -5}, "steps=-5"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"optimizer.learning_rate": np.inf}, "optimizer.learning_rate=inf"),
        ({"model.patch_size": 3}, "model.patch_size=3 does not divide model.input_size=8"),
        ({"model.num_heads": 5}, "model.num_heads=5 does not divide model.hidden_size=32"),
        ({"model.block": "mamba"}, "model.block='mamba': must be one of adaln_zero"),
        (
            {"diffusion.label_dropout": 0.0, "sample.every": 5},
            "guidance needs a null class, which diffusion.label_dropout=0",
        ),
    ],
    ids=str,
)
def test_bad_config_is_refused_naming_the_field(changes, words):
    with pytest.raises(configs.UserError, match=re.escape(words)):
        tiny(**changes)


def run_steps(devices, steps=20, **mesh):
    """The losses of the first steps on a mesh, in this process."""
    from dit_jax.data import pipeline, sources

    config = tiny(**{"model.hidden_size": 128, "model.remat": "none", "batch_size": 16})
    mesh = sharding.make_mesh(devices=jax.devices()[:devices], **mesh)
    init, step, target = setup.make_programs(config, mesh)
    state, out = init(jax.random.key(0)), []
    source, across = sources.digits()[0], sharding.batch_sharding(mesh)
    for s in range(steps):
        batch = pipeline.global_batch(source, s, seed=0, flip=False, batch_size=16, sharding=across)
        state, metrics = step(state, batch)
        out.append(float(metrics["loss"]))
    kernel = state.params["blocks"]["attn"]["qkv"]["kernel"]
    return np.array(out), kernel.sharding.spec, kernel.addressable_shards[0].data.size / kernel.size


@pytest.mark.parametrize(
    "meshes",
    [
        pytest.param([(4, dict(data=1, fsdp=2, tensor=2), 1 / 4)], id="fast"),
        pytest.param(
            [(4, dict(data=1, fsdp=4), 1 / 4), (4, dict(data=2, fsdp=1, tensor=2), 1 / 2)],
            id="rest",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_losses_agree_on_every_mesh(meshes):
    base, _, _ = run_steps(1)
    assert base[0] > base[-1] > 0
    for devices, mesh, share in meshes:
        values, spec, held = run_steps(devices, **mesh)
        assert held == share, (mesh, spec)
        assert_allclose(values, base, rtol=1e-4, err_msg=str(mesh))


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(command, uninterrupted, tmp_path):
    flags = [*TINY, "--config.checkpoint.every=4", f"--workdir={tmp_path}"]
    assert command("train", *flags, "--config.steps=8")[0] == 0
    status, out, err = command(
        "train", *flags, "--config.steps=24", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", devices=4
    )
    assert status == 0 and "'fsdp': 2, 'tensor': 2" in out, err
    ours, theirs = losses(tmp_path), losses(uninterrupted)
    assert_allclose([ours[s] for s in theirs], list(theirs.values()), rtol=1e-4)


def test_every_config_of_the_folder_resolves():
    import importlib.util

    names = []
    adamw = dict(learning_rate=1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    adamw |= dict(name="adamw", clip=0.0, warmup=0, schedule="constant")
    for path in sorted((ROOT / "configs").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = configs.resolve(module.get_config())
        names.append(config["model"]["name"])
        if config["model"]["name"]:
            b2 = 0.95 if config["objective"] == "meanflow" else 0.999  # as their papers have it
            assert config["optimizer"] == adamw | {"b2": b2}
            assert config["batch_size"] == 256 and config["ema_decay"] == 0.9999 and config["data"]["flip"]
    from dit_jax.models.dit import MODELS

    assert set(MODELS) <= set(names) and names.count("DiT-XL/2") == 8


@pytest.mark.slow
def test_one_step_of_the_papers_step_function(command, tmp_path):
    """configs/xl2.py itself, on noise for data, cut to two blocks: the whole command at the paper's width."""
    status, out, err = command(
        "train",
        "--config=configs/xl2.py",
        "--config.model.depth=2",
        "--config.data.source=synthetic",
        "--config.batch_size=4",
        "--config.steps=2",
        "--config.log_every=1",
        "--config.sample.steps=2",
        "--config.sample.classes=2",
        "--config.sample.per_class=1",
        f"--workdir={tmp_path}",
    )
    assert status == 0, err
    assert (tmp_path / "samples/00000002.png").exists() and (tmp_path / "loss.png").exists()
    first = losses(tmp_path)[1]
    assert 0.9 < first < 1.1  # the final layer starts at zero: the error is the noise's own size
