"""Several processes on this machine, as on several hosts: same run as one, whatever happens to one of them."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import threading
import time

import conftest
import numpy as np
import pytest
from conftest import TINY, TOY, losses, records, write_cache
from numpy.testing import assert_allclose
from objectives_test import OBJECTIVES

from dit_jax.data import pipeline
from dit_jax.runtime import hosts, meeting

RUN = [*TINY, "--config.steps=24", "--config.checkpoint.every=4"]
# First: every row that is read is noted, and `fault` is done.
FIRST = """
import os, sys
from dit_jax.data import sources
rows, fault = sys.argv[1:3]
examples = sources.Arrays.examples
for source in (sources.Arrays, sources.LatentCache):
    def noted(self, indices, flips, examples=source.examples):
        with open(rows, "a") as f:
            f.writelines(f"{index} {flip:d}\\n" for index, flip in zip(indices, flips))
        return examples(self, indices, flips)
    source.examples = noted
exec(fault)
del sys.argv[1:3]
"""


@pytest.fixture(scope="module")
def start():
    """start(count, *flags) -> the running processes. which: not all of them. faults: {index: code run first}."""
    started = []

    def run(count, *flags, name="train", which=None, faults={}, timeout=10, rows=os.devnull):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        processes = []
        for i in range(count) if which is None else which:
            among = (
                [
                    f"--coordinator=localhost:{port}",
                    f"--process_count={count}",
                    f"--process_id={i}",
                    f"--host_timeout={timeout}",
                ]
                if count > 1
                else []
            )
            argv = f"{rows}{i}" if rows != os.devnull else rows, faults.get(i, "")
            processes.append(conftest.start(name, *flags, *among, code=FIRST, argv=argv))
        started.extend(processes)
        return processes

    yield run
    for process in started:
        process.kill()


def ends(processes, timeout=120):
    """[(exit status, stdout, stderr)], after at most `timeout` seconds."""
    deadline = time.time() + timeout
    return [(p.returncode, out, err) for p in processes for out, err in [p.communicate(timeout=deadline - time.time())]]


def wait_for(condition, processes):
    deadline = time.time() + 120
    while not condition():
        assert all(p.poll() is None for p in processes), "\n".join(map(str, ends(processes)))
        assert time.time() < deadline
        time.sleep(0.01)


def step_reached(workdir, step):
    path = workdir / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= step


def one_line(err, *words):
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: host "), err
    for word in words:
        assert str(word) in lines[0], lines[0]


@pytest.fixture(scope="module")
def alone(uninterrupted):
    return losses(uninterrupted)


@pytest.mark.slow
def test_preempted_on_two_hosts_the_run_goes_on_on_one(start, tmp_path):
    """On a latent cache. SIGTERM to one of two processes: both save the same step. Each read its half of every batch and
    no more."""
    write_cache(tmp_path / "cache", 700)
    flags = [
        *RUN,
        "--config.data.source=latents",
        f"--config.data.path={tmp_path}/cache",
        "--config.data.flip=true",
        "--config.model.in_channels=4",
    ]
    [(status, _, err)] = ends(start(1, *flags, f"--workdir={tmp_path}/alone"))
    assert status == 0, err
    workdir = tmp_path / "run"
    processes = start(2, *flags, f"--workdir={workdir}", rows=tmp_path / "rows")
    wait_for(step_reached(workdir, 6), processes)
    processes[1].send_signal(signal.SIGTERM)
    (first, out, err), (second, out_1, err_1) = ends(processes)
    assert (first, second) == (hosts.AGAIN, hosts.AGAIN) and not err + err_1 + out_1, err + err_1 + out_1
    step = max(map(int, os.listdir(workdir / "checkpoints")))
    assert f"preempted: step {step} of 24 is saved" in out
    assert sorted(losses(workdir)) == list(range(1, step + 1)) and step < 24

    for i in range(2):
        read = np.loadtxt(tmp_path / f"rows{i}", dtype=int).tolist()
        mine = [pipeline.order(700, 0, True, s, 8, range(4 * i, 4 * i + 4)) for s in range(24)]
        mine = np.concatenate([np.stack(rows, axis=1) for rows in mine]).tolist()
        # Several batches are read at a time, and ahead of the steps.
        assert all(row in mine for row in read) and all(row in read for row in mine[: 4 * step])

    [(status, out, err)] = ends(start(1, *flags, f"--workdir={workdir}"))
    assert status == 0 and f"resuming from step {step} of 24" in out, err
    ours, alone = losses(workdir), losses(tmp_path / "alone")
    assert_allclose([ours[s] for s in alone], list(alone.values()), rtol=1e-4)


@pytest.mark.slow
def test_hosts_are_killed_and_their_number_changes(start, alone, tmp_path):
    """4 processes, then 2 on another mesh: killed at the coordinator, and frozen; then one. (That another than the first
    is killed is a test of sampling, below.)"""
    for count, mesh, victim, how, at in (
        (4, ["--config.mesh.fsdp=2"], 0, signal.SIGKILL, 6),
        (2, [], 1, signal.SIGSTOP, 14),
    ):
        before = max(map(int, os.listdir(tmp_path / "checkpoints")), default=0) if at > 6 else 0
        processes = start(count, *RUN, f"--workdir={tmp_path}", *mesh)
        wait_for(step_reached(tmp_path, at), processes)
        processes[victim].send_signal(how)
        others = [p for p in processes if p is not processes[victim]]
        for status, out, err in ends(others, timeout=10 + 15):
            assert status == hosts.AGAIN, (status, err)
            one_line(err, "another host was lost", "to resume")
        processes[victim].kill()
        steps = [int(name) for name in os.listdir(tmp_path / "checkpoints") if name.isdigit()]
        assert max(steps) >= max(before, at - 6)
    [(status, out, err)] = ends(start(1, *RUN, f"--workdir={tmp_path}"))
    assert status == 0 and "resuming from step" in out, err
    ours = losses(tmp_path)
    assert_allclose([ours[s] for s in alone], list(alone.values()), rtol=1e-4)


@pytest.mark.slow
def test_errors_of_one_host_end_all(start, tmp_path):
    flags = [*RUN, f"--workdir={tmp_path}/w"]
    broken = "sources.digits = lambda: (_ for _ in ()).throw(ValueError('no such data here'))"
    at_step = (
        "def noted(self, indices, flips, seen=[]):\n    seen.append(indices)\n"
        "    assert len(seen) < 10, 'disk'\n    return examples(self, indices, flips)\nsources.Arrays.examples = noted"
    )
    for victim, fault, word in (
        (0, broken, "no such data here"),
        (1, "sys.argv.append('--config.seed=3')", "seed (0 there, 3 here)"),
        (1, at_step, "AssertionError: disk"),
    ):
        results = ends(start(2, *flags, faults={victim: fault}), timeout=60)
        (status, _, err), (other, _, other_err) = results[victim], results[1 - victim]
        assert (status, other) == (1, 1), results
        assert f"error: host {victim}: " in err and word in err, err
        one_line(other_err, f"host {1 - victim}: host {victim} stopped: ", word)


@pytest.mark.slow
def test_a_host_that_never_comes(start, tmp_path):
    runs = [start(2, *RUN, f"--workdir={tmp_path}", which=[there], timeout=1)[0] for there in (0, 1)]
    whys = "not there: process 1", "Connection refused"
    for there, (status, _, err) in enumerate(ends(runs, timeout=60)):
        assert status == hosts.AGAIN
        one_line(err, f"host {there}", "did not all come together within", whys[there])


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, victim, flag, words",
    [
        (2, 1, "--process_count=3", ["--process_count=2 at process 0", "and 3 at process 1"]),
        (2, 0, "--process_count=3", ["--process_count=3 at process 0", "and 2 at process 1"]),
        (3, 2, "--process_id=1", ["--process_id=1 was given to two processes"]),
    ],
    ids=["2 and 3", "3 and 2", "an id twice"],
)
def test_flags_that_contradict_each_other(start, tmp_path, count, victim, flag, words):
    faults = {victim: f"sys.argv.append('{flag}')"}
    for status, _, err in ends(start(count, *RUN, f"--workdir={tmp_path}", faults=faults, timeout=60), timeout=15):
        assert status == 1
        one_line(err, *words)


@pytest.mark.slow
def test_a_checkpoint_that_one_host_cannot_read(start, uninterrupted, alone, tmp_path):
    """All fall back to the one before."""
    flags = [*RUN, "--config.steps=8", f"--workdir={tmp_path}"]
    for step in (4, 8):
        shutil.copytree(uninterrupted / f"checkpoints/{step}", tmp_path / f"checkpoints/{step}")
    lines = (uninterrupted / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 8))
    fault = """
from dit_jax.weights import checkpoint
meta = checkpoint.Checkpoints.meta
def unreadable(self, step):
    if step == 8:
        raise OSError("input/output error")
    return meta(self, step)
checkpoint.Checkpoints.meta = unreadable
"""
    results = ends(start(2, *flags, faults={1: fault}))
    assert [status for status, _, _ in results] == [0, 0], results
    assert (
        "checkpoints/8 cannot be read (input/output error)" in results[0][1] and "resuming from step 4" in results[0][1]
    )
    assert os.listdir(tmp_path / "damaged") == ["8"]
    ours = losses(tmp_path)
    assert_allclose([ours[s] for s in range(1, 9)], [alone[s] for s in range(1, 9)], rtol=1e-4)


@pytest.mark.slow
def test_sampling_on_two_hosts_makes_the_same_bytes(start, uninterrupted, tmp_path):
    flags = ["--num=20", "--batch_size=4", "--sampler=ddim", "--steps=4", "--cfg_scale=2", f"--workdir={uninterrupted}"]
    [(status, _, err)] = ends(start(1, *flags, f"--out={tmp_path}/one", name="sample"))
    assert status == 0, err
    # On two, where host 1 is gone after two of the five parts. The other may still save what was begun.
    killed = (
        "from dit_jax.sampling.generator import Generator\nmade = Generator.batches\n"
        "def batches(*args, **options):\n"
        "    for n, batch in enumerate(made(*args, **options)):\n"
        "        if n == 2: os.kill(os.getpid(), 9)\n"
        "        yield batch\n"
        "Generator.batches = batches"
    )
    processes = start(2, *flags, f"--out={tmp_path}/again", name="sample", faults={1: killed})
    (status, _, err), _ = ends(processes)
    assert status == hosts.AGAIN
    one_line(err, "another host was lost")
    results = ends(start(2, *flags, f"--out={tmp_path}/again", name="sample"))
    assert [status for status, _, _ in results] == [0, 0], results
    assert re.search(r"resuming from image (8|12|16) of 20", results[0][1]), results
    for name in ("samples.npz", "grid.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.slow
def test_evaluation_on_two_hosts_gives_the_same_numbers(start, picture_folders, tmp_path):
    """References, samples from a file and straight from the sampler; and FID during training. By a small network."""

    def run(count, name, *flags):
        results = ends(start(count, *flags, name=name, faults=dict.fromkeys(range(count), TOY)))
        assert {status for status, _, _ in results} == {0}, results

    run(1, "train", *TINY, "--config.steps=2", f"--workdir={tmp_path}/run")
    sampling = [
        "--num=11",
        "--sampler=ddim",
        "--steps=3",
        "--cfg_scale=1.5",
        "--batch_size=4",
        f"--workdir={tmp_path}/run",
    ]
    run(1, "sample", *sampling, "--classes=random", f"--out={tmp_path}/out")
    network = ["--inception=toy", "--features_batch_size=4"]
    references = [f"{tmp_path}/{count}.npz" for count in (1, 2)]
    for count, out in zip((1, 2), references):
        run(count, "reference", f"--path={picture_folders}", "--size=8", "--images=6", f"--out={out}", *network)
    one, two = map(np.load, references)
    for key in ("arr_0", "mu", "sigma", "mu_s", "sigma_s"):
        assert_allclose(two[key], one[key], rtol=1e-5, atol=1e-5 * np.abs(one[key].astype(float)).max())
    for source in ([f"--samples={tmp_path}/out/samples.npz", "--num=0"], sampling):
        reports = [tmp_path / f"report{count}.json" for count in (1, 2)]
        for count, out in zip((1, 2), reports):
            run(count, "evaluate", *source, f"--reference={references[0]}", f"--out={out}", *network)
        one, two = (json.loads(out.read_text()) for out in reports)
        assert one["samples"]["sha256"] == two["samples"]["sha256"] and one["metrics"]["kid"] is not None
        assert_allclose(list(two["metrics"].values()), list(one["metrics"].values()), rtol=1e-5)

    during = [
        "--config.eval.every=2",
        "--config.eval.num=11",
        f"--config.eval.reference={references[0]}",
        "--config.eval.inception=toy",
        "--config.sample.sampler=ddim",
        "--config.sample.steps=3",
    ]
    found = []
    for count in (1, 2):
        run(count, "train", *TINY, "--config.steps=2", *during, f"--workdir={tmp_path}/during{count}")
        found += [r for r in records(tmp_path / f"during{count}") if "loss" not in r]
    assert len(found) == 2 and found[0].keys() == found[1].keys()
    # Pixels on the edge of two grey levels fall to either side: the two runs are the same up to rounding.
    assert_allclose(found[1]["fid_11"], found[0]["fid_11"], rtol=1e-2)


@pytest.mark.parametrize(
    "flags, word",
    [
        ({"count": 2}, "--coordinator and --process_id missing"),
        ({"coordinator": "h:1", "count": 2, "index": 2}, "--process_id=2 --process_count=2"),
        ({"coordinator": "host", "count": 2, "index": 1}, "HOST:PORT"),
    ],
    ids=["missing", "out of range", "no port"],
)
def test_flags_that_do_not_fit_together(flags, word):
    with pytest.raises(hosts.UserError, match=word):
        hosts._arguments(**{"coordinator": None, "count": None, "index": None} | flags)


def test_a_port_that_is_taken_is_said():
    with socket.socket(socket.AF_INET6) as s:
        s.bind(("::", 0))
        s.listen()
        with pytest.raises(hosts.UserError, match="Address already in use; perhaps another process has --process_id=0"):
            meeting._listen(f"localhost:{s.getsockname()[1]}")


GREETING = {
    "protocol": 1,
    "command": "train.py",
    "process_count": 3,
    "process_id": 0,
    "host": "here",
    "pid": 7,
    "key": "0",
}


@pytest.fixture
def at_meeting():
    """(its address, its thread) of process 0 of three."""
    server = meeting._listen("localhost:0")
    address = f"localhost:{server.getsockname()[1]}"
    thread = threading.Thread(target=meeting._answer, args=(server, GREETING, time.monotonic() + 20))
    thread.start()
    return address, thread


def ask(address, index, **other):
    return meeting._ask(address, GREETING | {"process_id": index, "key": str(index)} | other, time.monotonic() + 20)


def test_what_else_connects_does_not_disturb_the_meeting(at_meeting):
    """Junk, and process 1, killed and started again. After it the port is free."""
    address, thread = at_meeting
    port = int(address.split(":")[1])
    first = json.dumps(GREETING | {"process_id": 1, "key": "a"}).encode() + b"\n"
    for text in (
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 4000 + b"\n",
        bytes(10**6),
        b"1\n",
        first[:-9],
        b"[1]\n",
        b'{"protocol": 1}\n',
        first.replace(b"3", b'"3"'),
        first,
    ):
        with socket.create_connection(("localhost", port), timeout=5) as s:
            answer = b""
            with contextlib.suppress(OSError):
                s.sendall(text)
                answer = s.recv(99)
            assert bool(answer) == (text == first)
    answers = []
    threads = [threading.Thread(target=lambda i=i: answers.append(ask(address, i))) for i in range(3)]
    for t in threads:
        t.start()
    for t in (*threads, thread):
        t.join(20)
    assert answers == [(0, "")] * 3
    meeting._listen(address).close()


@pytest.mark.parametrize(
    "index, other, line",
    [
        (
            1,
            {"process_count": 2},
            "--process_count=3 at process 0 (pid 7 on here), and 2 at process 1 (pid 7 on there)",
        ),
        (1, {"command": "sample.py"}, "command=train.py at process 0 (pid 7 on here), and sample.py at process 1"),
        (0, {}, "--process_id=0 was given to two processes: pid 7 on here and pid 7 on there"),
    ],
    ids=["counts", "commands", "process 0 twice"],
)
def test_what_the_meeting_says(index, other, line):
    one = GREETING | {"process_id": index, "key": "1", "host": "there"} | other
    status, text = meeting._verdict([GREETING, one], GREETING, late=False)
    assert status == 1 and text.startswith(line)


@pytest.mark.parametrize("text, error", [(b"SSH-2.0-x\r\n", hosts.UserError), (bytes(9), ConnectionError)])
def test_another_program_at_the_port(text, error):
    ours, its = socket.socketpair()
    with ours, its, pytest.raises(error):
        its.sendall(text)
        its.shutdown(socket.SHUT_WR)
        list(meeting._answers(ours, "host:1"))


def test_the_environment_of_a_tpu_slice_says_how_many_hosts(monkeypatch):
    """A machine without a TPU asks nobody; GKE says it in variables, a TPU VM's metadata server says it."""
    attributes = {
        "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2",
        "tpu-env": "X: '1'\nMEGASCALE_NUM_SLICES: '2'\n",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            self.send_response(200 if value else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    assert hosts.tpu_slice() == (1, None)
    monkeypatch.setattr(hosts.process, "tpu_attached", lambda: True)
    assert hosts.tpu_slice() == (4, "gcetpu")
    attributes.clear()
    assert hosts.tpu_slice()[0] == 1
    server.shutdown()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert hosts._arguments(None, None, None) is None
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t-0,t-1,t-2")
    assert hosts._arguments(None, None, None) == {"cluster_detection_method": "gketpu"}
    assert hosts._arguments(None, 1, None) is None


def assert_same_training(one, two):
    """Two lists of records have the same losses and norms, at the same steps."""
    one, two = ([[r[name] for name in ("step", "loss", "grad_norm", "param_norm")] for r in rs] for rs in (one, two))
    assert_allclose(two, one, rtol=1e-4)
    assert len(one) >= 5 and np.ptp(one, axis=0).min() > 0


@pytest.mark.slow
def test_a_flow_run_and_its_averages_are_those_of_one_host(start, tmp_path):
    """The averages are split over the hosts, and the first one writes them whole."""
    from dit_jax.weights import snapshots

    flags = [*TINY, *OBJECTIVES["flow"], "--config.model.hidden_size=128", "--config.steps=6"]
    flags += ["--config.average.every=3"]
    for count, mesh in ((1, []), (2, ["--config.mesh.fsdp=2"])):
        for status, _, err in ends(start(count, *flags, *mesh, f"--workdir={tmp_path}/{count}")):
            assert status == 0, err
    for step in (3, 6):
        one, two = (
            snapshots.open_file(snapshots.path_of(f"{tmp_path}/{count}", snapshots.SNAPSHOTS, step))[1]
            for count in (1, 2)
        )
        assert set(one) == set(two)
        for name, value in one.items():
            assert_allclose(two[name], value, atol=1e-4, err_msg=name)
    assert_same_training(*(records(tmp_path / count) for count in "12"))


@pytest.mark.slow
def test_meanflow_trains_on_two_hosts_as_on_one(start, tmp_path):
    """Times, noise and label drops are drawn for the whole batch, of which each host has half."""
    for count in (1, 2):
        flags = [*TINY, *OBJECTIVES["meanflow"], "--config.steps=5", f"--workdir={tmp_path}/{count}"]
        for status, _, err in ends(start(count, *flags)):
            assert status == 0, err
    assert_same_training(*(records(tmp_path / count) for count in "12"))
