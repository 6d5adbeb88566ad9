"""What the commands share."""

import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = sorted({p.stem for p in (ROOT / "dit_jax").glob("*.py") if "cli.run(main)" in p.read_text()})


@pytest.mark.parametrize("name", COMMANDS)
def test_help_does_not_wait_for_jax(name):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", f"dit_jax.{name}", "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    assert f"python -m dit_jax.{name}" in done.stdout and "Try --helpfull" in done.stdout, done.stderr[-1000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dit_jax.cli" in imported and not imported & {"jax", "flax", "orbax", "torch", "sklearn", "matplotlib"}


def test_help_shows_the_flags_that_commands_share():
    done = subprocess.run([sys.executable, "-m", "dit_jax.evaluate", "--help"], cwd=ROOT, capture_output=True, text=True)
    for flag in ("samples", "reference", "features", "workdir", "cfg_scale", "process_id"):
        assert f"--{flag}:" in done.stdout
