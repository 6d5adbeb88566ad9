"""Drawn faults: signals at any moment, full disks, folders that may not be written, two commands at once. Files that lie are
in faults_files_test.py.

DIT_JAX_FAULTS=N draws N times as many; DIT_JAX_FAULTS_SEED=N draws others.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TOY, records, save_vae
from PIL import Image
from train_test import same_bits

pytestmark = pytest.mark.slow
FAULTS = int(os.environ.get("DIT_JAX_FAULTS", "1"))
SEED = int(os.environ.get("DIT_JAX_FAULTS_SEED", "0"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {signal.SIGKILL: {-signal.SIGKILL, 0}, signal.SIGTERM: {75, 0}, signal.SIGINT: {1, 0}}
STEPS = [
    "--config.steps=24",
    "--config.checkpoint.every=4",
    "--config.log_every=3",
    "--config.sample.every=8",
    "--config.sample.per_class=1",
    "--config.sample.classes=2",
    "--config.sample.sampler=ddim",
    "--config.sample.steps=2",
]
# First: as root, without root's right to pass by permissions.
AS_USER = """
import ctypes
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
"""
LIMIT = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"


@pytest.fixture(scope="module")
def made(command, tmp_path_factory):
    """A folder with a run, a VAE, pictures and a reference; for each command, what it wrote undisturbed."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    save_vae(folder / "vae", 0)
    for i in range(60):
        (folder / "pictures" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(
            folder / "pictures" / "abc"[i % 3] / f"{i:02d}.png"
        )
    np.savez(folder / "reference.npz", arr_0=rng.integers(256, size=(20, 8, 8, 3), dtype=np.uint8))
    status, _, err = command("train", *TINY, "--config.steps=2", f"--workdir={folder}/run")
    assert status == 0, err
    for name in FLAGS:
        status, _, err = run(command, name, folder, folder / "undisturbed" / name)
        assert status == 0 and not err, err
    return folder


FLAGS = {
    "train": lambda made, out: [*TINY, *STEPS, f"--workdir={out}"],
    "sample": lambda made, out: [
        f"--workdir={made}/run",
        f"--out={out}",
        "--num=48",
        "--batch_size=8",
        "--sampler=ddim",
        "--steps=4",
        "--cfg_scale=2",
        "--png",
    ],
    "encode": lambda made, out: [
        f"--path={made}/pictures",
        f"--vae={made}/vae",
        "--size=32",
        "--shard_size=8",
        f"--out={out}",
    ],
    "evaluate": lambda made, out: [
        f"--workdir={made}/run",
        f"--reference={made}/reference.npz",
        "--inception=toy",
        "--num=24",
        "--batch_size=4",
        "--sampler=ddim",
        "--steps=4",
        f"--out={out}/report.json",
    ],
    "convert": lambda made, out: [f"--workdir={made}/run", f"--out={out}/weights.npz"],
}


def run(command, name, made, out, code="", **settings):
    Path(out).mkdir(parents=True, exist_ok=True)
    return command(name, *FLAGS[name](made, out), code=(TOY if name == "evaluate" else "") + code, **settings)


def files(folder):
    """{path: bytes} of what a command leaves for good."""
    found = {str(p.relative_to(folder)): p for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not name.startswith(("checkpoints", "damaged", "compiled"))
        and name != "metrics.jsonl"
        and name != "loss.png"
    }


def check_same(name, out, undisturbed):
    """The command's result is the one without disturbance, and nothing else lies there."""
    ours, theirs = files(out), files(undisturbed)
    assert ours.keys() == theirs.keys()
    for file in theirs:
        assert ours[file].replace(str(out).encode(), b"OUT") == theirs[file].replace(
            str(undisturbed).encode(), b"OUT"
        ), file
    if name == "train":
        assert same_bits(out, undisturbed) and means(out) == means(undisturbed)


def means(workdir):
    """The records of metrics.jsonl but for what is timed."""
    timed = {"steps_per_second", "images_per_second", "data_wait", "mfu"}
    return [{key: value for key, value in record.items() if key not in timed} for record in records(workdir)]


def check_whole(out):
    """Whatever has its name is whole."""
    for name, data in files(out).items():
        if name.endswith(".json"):
            json.loads(data)
        elif name.endswith(".png"):
            Image.open(io.BytesIO(data)).load()
        elif name.endswith(".npz"):
            assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    checkpoints = Path(out) / "checkpoints"
    for step in checkpoints.glob("*") if checkpoints.exists() else ():
        assert not step.name.isdigit() or {"params", "ema", "optimizer", "meta"} <= set(os.listdir(step))


def check_ended(result, allowed):
    """The status is one of these; at most one line is on stderr, and it is no defect's."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert status in allowed and len(lines) <= 1 and "Traceback" not in err and "defect" not in err, (
        status,
        out[-500:],
        err,
    )
    assert all(line.startswith("error: ") for line in lines) and bool(lines) == (status == 1 or bool(lines)), err
    return lines[0] if lines else ""


def listens(process):
    """Whether the process has begun: it catches SIGTERM."""
    with contextlib.suppress(OSError), open(f"/proc/{process.pid}/status") as f:
        caught = next(int(line.split()[1], 16) for line in f if line.startswith("SigCgt"))
        return bool(caught >> (signal.SIGTERM - 1) & 1)
    return False


def disturb(process, number, wait):
    """Sends a signal `wait` seconds after the process has begun -> (status, stdout, stderr), within 15 s."""
    while not listens(process) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(wait)
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            process.send_signal(number)
    out, err = process.communicate(timeout=15)
    return process.returncode, out, err


@pytest.mark.parametrize("name", FLAGS)
def test_signals_at_any_moment(command, made, tmp_path, name):
    """SIGKILL, SIGTERM and SIGINT in turn; then the same command ends with the same bytes."""
    rng, start = np.random.default_rng([SEED, *name.encode()]), time.perf_counter()
    assert run(command, name, made, tmp_path / "timed")[0] == 0
    duration = time.perf_counter() - start
    for n in range(3 * FAULTS):
        number = SIGNALS[n % 3]
        process = run(command, name, made, tmp_path / "out", wait=False)
        line = check_ended(disturb(process, number, rng.uniform(0, duration)), ENDS[number])
        assert not line or "same command" in line
        check_whole(tmp_path / "out")
    check_ended(run(command, name, made, tmp_path / "out"), {0})
    check_same(name, tmp_path / "out", made / "undisturbed" / name)


@pytest.mark.parametrize("name", FLAGS)
def test_a_full_disk(command, made, tmp_path, name):
    """By a limit on a file's size, and by a small file system where one can be mounted."""
    rng = np.random.default_rng([SEED, *name.encode()])
    largest = max(p.stat().st_size for p in (made / "undisturbed" / name).rglob("*") if p.is_file())
    for n in range(2 * FAULTS):
        size = int(rng.integers(1, largest))
        line = check_ended(run(command, name, made, tmp_path / "out", code=LIMIT.format(size=size)), {0, 1})
        # Of the output file as well, where the test's stdout is limited.
        assert not line or (str(tmp_path / "out") in line or "the output" in line) and "File too large" in line, line
        check_whole(tmp_path / "out")
    check_ended(run(command, name, made, tmp_path / "out"), {0})
    check_same(name, tmp_path / "out", made / "undisturbed" / name)

    total = sum(p.stat().st_size for p in (made / "undisturbed" / name).rglob("*") if p.is_file())
    for n in range(2 * FAULTS):
        small = tmp_path / f"small{n}"
        small.mkdir()
        size = int(rng.integers(4096, max(total, 2**14)))
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={rng.integers(3, 60)}", "tmpfs", small],
            capture_output=True,
        ).returncode:
            return  # not root, or a container: the limit above has to do
        try:
            line = check_ended(run(command, name, made, small / "out", code=""), {0, 1})
            assert not line or "No space left" in line or "are free" in line, line
            check_whole(small / "out")
            subprocess.run(["mount", "-o", "remount,size=50m,nr_inodes=10k", small], check=True)
            check_ended(run(command, name, made, small / "out"), {0})
            check_same(name, small / "out", made / "undisturbed" / name)
        finally:
            subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.parametrize("name", FLAGS)
def test_a_folder_that_may_not_be_written(command, made, tmp_path, name):
    """By this user: from the beginning, and from the middle on."""
    code = AS_USER if os.geteuid() == 0 else ""
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o500)
    line = check_ended(run(command, name, made, out, code=code), {1})
    assert str(out) in line and "Permission denied" in line
    assert not list(out.iterdir())
    out.chmod(0o700)
    process = run(command, name, made, out, code=code, wait=False)
    while not (found := list(out.iterdir())) and process.poll() is None:
        time.sleep(0.001)
    for folder in (out, *(p for p in found if p.is_dir())):
        folder.chmod(0o500)
    output, err = process.communicate(timeout=60)
    line = check_ended((process.returncode, output, err), {0, 1})
    assert not line or str(out) in line and "Permission denied" in line, line
    for folder in (out, *(p for p in out.rglob("*") if p.is_dir())):
        folder.chmod(0o700)
    check_whole(out)
    check_ended(run(command, name, made, out), {0})
    check_same(name, out, made / "undisturbed" / name)


@pytest.mark.parametrize("name", ["train", "sample", "encode"])
def test_two_at_once(command, made, tmp_path, name):
    """One does the work, the other says who does, or finds it done."""
    rng, refused = np.random.default_rng([SEED, *name.encode()]), 0
    for n in range(3 * FAULTS):
        out = tmp_path / str(n)
        first = run(command, name, made, out, wait=False)
        time.sleep(rng.uniform(0, 0.5) if n else 0)
        second = run(command, name, made, out, wait=False)
        results = [(p.returncode, *output) for p in (first, second) for output in [p.communicate(timeout=60)]]
        lines = [check_ended(result, {0, 1}) for result in results]
        assert 0 in [status for status, *_ in results]
        for line, other in zip(lines, (second, first)):
            if line:
                refused += 1
                assert f"{out}: process {other.pid} on host " in line and "since" in line, line
        check_same(name, out, made / "undisturbed" / name)
    assert refused


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(command, made, tmp_path):
    shutil.copytree(made / "undisturbed/train", tmp_path / "run")
    meta = tmp_path / "run/checkpoints/24/meta/metadata"
    meta.chmod(0)
    line = check_ended(run(command, "train", made, tmp_path / "run", code=AS_USER if os.geteuid() == 0 else ""), {1})
    assert str(meta) in line and "Permission denied" in line
    assert not (tmp_path / "run/damaged").exists()
    meta.chmod(0o600)
    check_ended(run(command, "train", made, tmp_path / "run"), {0})
    check_same("train", tmp_path / "run", made / "undisturbed/train")


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("fingerprints",), None, "has no fingerprints: an older version"),
        (("fingerprints", "params"), "1", "its meta has fingerprints="),
        (("config", "model"), None, "no config.model."),
        (("train_seconds",), "x", "train_seconds='x'"),
        (("unlogged",), [{"loss": "x"}], "unlogged="),
        (("config", "model", "dtype"), "int7", "model.dtype='int7'"),
        (("data",), 7, "data=7"),
    ],
    ids=str,
)
def test_a_meta_that_lies(command, made, tmp_path, path, value, words):
    """The checkpoint of an older version is left where it is; what is damaged goes aside, and the one before is taken."""
    shutil.copytree(made / "undisturbed/train", tmp_path / "run")
    file = tmp_path / "run/checkpoints/24/meta/metadata"
    meta = json.loads(file.read_text())
    *parents, leaf = path
    section = functools.reduce(dict.__getitem__, parents, meta)
    section[leaf] = value
    if value is None:
        del section[leaf]
    file.write_text(json.dumps(meta))
    result = run(command, "train", made, tmp_path / "run")
    line = check_ended(result, {0, 1})
    assert words in (line or result[1])
    assert bool(line) == ("older version" in words) != (tmp_path / "run/damaged/24").exists()
    if not line:
        check_same("train", tmp_path / "run", made / "undisturbed/train")
