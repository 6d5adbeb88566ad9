"""What the README shows, done. tests/docs_test.py has the other pages."""

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
    assert scope["images"].shape == (4, 8, 8, 3) and scope["images"].std() > 0
    assert (tmp_path / "three.png").stat().st_size > 500


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150


def test_numbers_are_those_of_the_table():
    """What XL/2 needs, as in the table of docs/preflight.md."""
    page = (ROOT / "docs/preflight.md").read_text()
    table = page[page.index("## The table") :]
    for name in ("v3-8", "v5e-1", "v5e-16", "v3-256"):
        row = re.search(rf"^\| {name}\b[^|]*\|(.*)\|$", README, re.M)[1]
        memory, time, images = (cell.strip().split()[0].replace(",", "") for cell in row.split("|"))
        cells = re.search(rf"^\| {name} \| DiT-XL/2 \|(.*)\|$", table, re.M)[1].split("|")
        bounds = [float(bound) for bound in cells[4].split(",")]
        assert cells[2].split()[0] == memory and max(bounds) == float(time)
        assert cells[5].strip().replace(",", "") == images


def test_every_config_is_named():
    text = (ROOT / "docs/training.md").read_text()
    table = text[text.index("| config |") : text.index("## The recipe")]
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
