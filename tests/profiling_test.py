"""What tells where the time goes, or where a NaN comes from."""

import jax
import numpy as np
import pytest
from conftest import TINY, one_error

from dit_jax.runtime.errors import UserError
from dit_jax.training.trace import Trace


@pytest.mark.slow
def test_a_trace_holds_the_steps_asked_for(command, tmp_path):
    flags = [*TINY, "--config.steps=6", f"--workdir={tmp_path}"]
    status, out, err = command("train", *flags, "--profile=3:5")
    assert status == 0 and not err and f"xprof --logdir={tmp_path}/profile" in out, err
    [path] = (tmp_path / "profile").rglob("*.xplane.pb")
    steps = [
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == [3, 4, 5]
    # The same command, as after a preemption, must go on.
    status, out, err = command("train", *flags, "--config.steps=8", "--profile=5:7")
    assert status == 0 and "the run is already at step 6; no trace" in out and "done: step 8" in out, err


@pytest.mark.parametrize("text", ["5", "5:3", "0:2", "3:9", "a:b", "-1:2"])
def test_a_trace_of_steps_that_are_not_made_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=f"--profile={text}"):
        Trace(text, str(tmp_path), 1, 6)


@pytest.mark.slow
def test_debug_nans_names_the_line(command, tmp_path):
    images = np.random.default_rng(0).normal(size=(64, 8, 8, 1)).astype(np.float32)
    images[20] = np.nan
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.zeros(64, np.int64))
    flags = [
        *TINY,
        "--config.steps=12",
        "--config.data.source=arrays",
        "--config.data.flip=False",
        f"--config.data.path={tmp_path}",
    ]
    one_error(command("train", *flags, f"--workdir={tmp_path}/a"), "the loss is nan", "no checkpoint was written")
    status, _, err = command("train", *flags, f"--workdir={tmp_path}/b", "--debug_nans")
    assert (
        status == 1 and "in q_sample" in err and "FloatingPointError: invalid value (nan) encountered in mul" in err
    ), err


def test_compiled_programs_are_kept_apart_by_kind_of_cpu(tmp_path, monkeypatch):
    """In the user's cache, unless JAX was told another folder."""
    from dit_jax.runtime.process import keep_compiled

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        for told, kept in ((str(tmp_path / "told"), str(tmp_path / "told")), (None, str(tmp_path / "dit_jax/cpu-"))):
            jax.config.update("jax_compilation_cache_dir", told)
            keep_compiled("unused")
            assert jax.config.jax_compilation_cache_dir.startswith(kept)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
