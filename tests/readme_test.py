"""What the README shows, done."""

import json
import os
import re
import subprocess

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_python_example(uninterrupted, tmp_path, monkeypatch):
    """With a short run in the place of the two-minute one."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(uninterrupted)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], scope)
    assert scope["images"].shape == (16, 8, 8, 3) and scope["images"].std() > 0


def test_every_config_is_named():
    table = README[README.index("| config |") : README.index("The recipe is")]
    named = set(re.findall(r"[a-z][a-z0-9_]+", " ".join(re.findall(r"`([^`]+)`", table))))
    assert {p.stem for p in (ROOT / "configs").glob("*.py")} <= named


@pytest.mark.slow
def test_main_command_in_a_fresh_clone_and_environment(tmp_path):
    line = next(line for line in README.splitlines() if line.startswith("python3 -m venv .venv &&"))
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path / "clone", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "clone/runs/digits"
    report = json.loads((run / "report.json").read_text())
    print(report)
    assert report["judge_accuracy"] >= 0.97
    assert report["recognised"] >= 0.95
    assert report["frechet_floor"] < report["frechet"] < 0.1 * report["frechet_noise"]
    assert (run / "loss.png").exists() and len(list((run / "samples").iterdir())) == 2
    installed = subprocess.run([".venv/bin/pip", "list"], cwd=tmp_path / "clone", capture_output=True, text=True).stdout
    assert not re.search(r"^(torch|tensorflow)\s", installed, re.M)
