"""The package without a checkout: what a wheel holds, and which file --config takes."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

from dit_jax import cli
from dit_jax.runtime.errors import UserError


def test_a_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli._config_file("configs/sit.py:B/2") == f"{ROOT}/configs/sit.py:B/2"
    assert f"the package's own is used: {ROOT}/configs/sit.py" in capsys.readouterr().out
    for name in ("configs/none.py", "sit.py", "other/sit.py", "/configs/sit.py"):
        with pytest.raises(UserError, match=f"--config={name}: no such file; the package's own are in {ROOT}/configs"):
            cli._config_file(name)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/sit.py").write_text("")
    assert cli._config_file("configs/sit.py") == "configs/sit.py" and not capsys.readouterr().out


@pytest.mark.slow
def test_a_wheel_is_enough(tmp_path):
    """Built, installed and used: the main command for some steps, samples of the run, another command's --help."""
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    hidden = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=hidden)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("dit_jax-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", f"--target={site}", str(wheel)], check=True)
    shutil.rmtree(source)
    empty.mkdir()

    def run(name, *flags):
        env = os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": ""}
        done = subprocess.run(
            [sys.executable, "-m", f"dit_jax.{name}", *flags], cwd=empty, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    status, out, err = run("train", *TINY, "--config.steps=2", "--workdir=run")
    assert status == 0, err
    assert (
        f"--config=configs/digits.py: no such file here; the package's own is used: {site}/dit_jax/configs/digits.py"
        in out
    )
    status, _, err = run("sample", "--workdir=run", "--num=2", "--steps=2")
    assert status == 0 and (empty / "run/out/grid.png").exists(), err
    status, out, err = run("preflight", "--help")
    assert status == 0 and "--topology" in out, err
    status, _, err = run("train", "--config=configs/none.py", "--workdir=run")
    assert status == 1 and err.startswith("error: ") and f"the package's own are in {site}/dit_jax/configs" in err
