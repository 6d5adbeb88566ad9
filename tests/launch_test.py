"""launch/: the pod script against a stand-in gcloud and stand-in hosts, its linter; the GKE manifest; the notebook."""

import ast
import base64
import importlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import nbclient
import nbformat
import numpy as np
import PIL.Image
import pytest
import yaml
from conftest import ROOT, TINY, one_error

import dit_jax
from dit_jax.weights.published import published_shapes

SCRIPT = ROOT / "launch/tpu_pod.sh"

# What gcloud's reference lists (read in November 2026; gcloud 528 agrees), with the flags that all commands take.
REFERENCE = "https://cloud.google.com/sdk/gcloud/reference/"
WIDE = "--project --quiet --format"  # REFERENCE, "gcloud wide flags"
FLAGS = {
    "compute/tpus/queued-resources/create": "--zone --node-id --accelerator-type --runtime-version --spot",
    "compute/tpus/queued-resources/describe": "--zone",
    "compute/tpus/queued-resources/delete": "--zone --force",
    "compute/tpus/tpu-vm/describe": "--zone",
    "compute/tpus/tpu-vm/ssh": "--zone --worker --command",
    "compute/tpus/tpu-vm/scp": "--zone --worker --recurse",
    "storage/rsync": "--recursive --exclude",
    "storage/ls": "",
}
FLAGS = {command.replace("/", " "): f"{flags} {WIDE}".split() for command, flags in FLAGS.items()}

WHERE = ["--project=my-project", "--zone=europe-west4-a"]
UP = dict(states=["ACTIVE"], nodes=["READY"])

# Records its calls in calls.jsonl, refuses what the reference does not list, and plays plan.json: "lives", one for each
# create, each with the states of the queued resource and of the TPU VM, look after look (the last one stays), or with
# the service's refusal; "broken", the exit statuses of the first calls of ssh and scp. Those that work are done: a
# command runs in the home directory of its host, hosts/N, and scp copies from and to there.
GCLOUD = r"""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
here, args = Path(__file__).resolve().parent.parent, sys.argv[1:]
with open(here / "calls.jsonl", "a") as f:
    f.write(json.dumps(args) + "\n")

def fail(message, status=1):
    sys.exit(print(f"ERROR: (gcloud) {message}", file=sys.stderr) or status)

flags = {a.partition("=")[0]: a.partition("=")[2] for a in args if a.startswith("--")}
words = [a for a in args if not a.startswith("--")]
known = json.loads((here / "flags.json").read_text())
command = next((c for c in known if words[:len(c.split())] == c.split()), None)
if command is None:
    fail(f"Invalid choice: {words}", 2)
for flag in flags:
    if flag not in known[command]:
        fail(f"unrecognized arguments: {flag}", 2)
words = words[len(command.split()):]
plan = json.loads((here / "plan.json").read_text())

def save():
    (here / "plan.json").write_text(json.dumps(plan))

def look(name):
    states = plan["life"][name]
    state = states.pop(0) if len(states) > 1 else states[0]
    save()
    return state

if command.endswith("create"):
    if plan["life"]:
        fail("ALREADY_EXISTS: Resource already exists.")
    life = plan["lives"].pop(0)
    if "refused" in life:
        save()
        fail(life["refused"])
    plan["life"] = {"states": ["ACTIVE"], "nodes": ["READY"], **life}
    save()
elif command.endswith("describe"):
    if not plan["life"]:
        fail("NOT_FOUND: Resource 'dit' was not found")
    state = look("nodes" if "tpu-vm" in command else "states")
    if state == "unavailable":
        fail("UNAVAILABLE: The service is currently unavailable.")
    if state == "denied":
        fail("PERMISSION_DENIED: Permission 'tpu.queuedResources.get' denied.\\nSee https://cloud.google.com/iam/docs")
    print(state)
elif command.endswith("delete"):
    if not plan["life"]:
        fail("NOT_FOUND: Resource 'dit' was not found")
    plan["life"] = None
    save()
    for file in (here / "hosts").glob("*/dit_jax-run/pid"):
        command = Path("/proc", file.read_text().strip(), "cmdline")
        if command.exists() and str(here) in command.read_text():
            os.killpg(int(file.read_text()), signal.SIGKILL)
            time.sleep(0.1)
    for host in (here / "hosts").iterdir():
        shutil.rmtree(host)
        host.mkdir()
elif command.startswith("storage"):
    local = [str(here / "bucket" / w[len("gs://my-bucket/"):]) if w.startswith("gs://") else w for w in words]
    if command.endswith("ls"):
        print("\n".join(f"{words[0]}{p.name}/" for p in Path(local[0]).iterdir()))
    else:
        shutil.copytree(*local, dirs_exist_ok=True, ignore=lambda d, names: {"checkpoints"} & set(names))
else:
    if plan["broken"] and (status := plan["broken"].pop(0)):
        save()
        fail("[/usr/bin/ssh] exited with return code [255].", status)
    save()
    hosts = sorted((here / "hosts").iterdir())
    hosts = hosts if flags["--worker"] == "all" else [hosts[int(flags["--worker"])]]
    status = 0
    for host in hosts:
        env = dict(os.environ, HOME=str(host), PATH=f"{here}/host-bin:{os.environ['PATH']}")
        if command.endswith("ssh"):
            status |= subprocess.run(["bash", "-c", flags["--command"]], cwd=host, env=env).returncode
        else:
            there = [host / w.partition(":")[2] if w.startswith("dit:") else w for w in words]
            for source in there[:-1]:
                status |= subprocess.run(["cp", "-r", source, there[-1]]).returncode
    sys.exit(status)
"""

# On a host: python3 brings uv, which makes an environment whose python is a stand-in for training. That records its
# arguments and ends with the next status of the folder's statuses.N, N being the host, or stays until SIGTERM, at which
# it saves and ends with 75.
PYTHON3 = r"""#!/usr/bin/env bash
mkdir -p "$HOME/.local/bin"
cp "$HOME/../../uv" "$HOME/.local/bin/uv"
"""
UV = r"""#!/usr/bin/env bash
echo "$*" >>"$HOME/installed"
[[ $1 == venv ]] || exit 0
mkdir -p "${@: -1}/bin"
cp "$HOME/../../train" "${@: -1}/bin/python"
"""
TRAIN = r"""#!/usr/bin/env bash
echo "$*" >>"$HOME/trained"
trap 'sleep 0.2; echo saved >>"$HOME/trained"; exit 75' TERM
statuses=$HOME/../../statuses.${HOME##*/}
status=$(head -n 1 "$statuses" 2>/dev/null)
if [[ -n $status ]]; then sed -i 1d "$statuses"; fi
if [[ $status == 1 ]]; then echo "error: --config=x: is bad" >&2; fi
if [[ -n $status && $status != stay ]]; then exit "$status"; fi
touch "$HOME/up"
while :; do sleep 0.05; done
"""


class Cloud:
    """A folder with bin/gcloud, two hosts and a bucket."""

    def __init__(self, path):
        self.path = path
        for name in ("bin", "host-bin", "hosts/0", "hosts/1", "bucket"):
            (path / name).mkdir(parents=True)
        self.program("bin/gcloud", f"#!{sys.executable} -IS\n{GCLOUD}")
        self.program("host-bin/mountpoint", "#!/bin/sh\nexit 1\n")
        for name, text in (("host-bin/python3", PYTHON3), ("uv", UV), ("train", TRAIN)):
            self.program(name, text)
        for name in ("gcsfuse", "sudo"):
            self.program(f"host-bin/{name}", f'#!/bin/sh\necho {name} "$@" >>"$HOME/mounted"\n')
        (path / "flags.json").write_text(json.dumps(FLAGS))
        self.plan()

    def program(self, name, text):
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def plan(self, lives=(), broken=(), life=None):
        (self.path / "plan.json").write_text(json.dumps(dict(lives=list(lives), broken=list(broken), life=life)))

    def statuses(self, host, *statuses):
        """What the next starts of training on a host end with, or "stay"."""
        (self.path / f"statuses.{host}").write_text("".join(f"{s}\n" for s in statuses))

    def run(self, *args, **env):
        """-> (exit status, stdout, stderr) of tpu_pod.sh."""
        env = dict(
            os.environ, PATH=f"{self.path}/bin:{os.environ['PATH']}", TPU_POD_BACKOFF="0", TMPDIR=str(self.path), **env
        )
        if args[0] == "watch":
            args = ("watch", "--poll=0", *args[1:])
        done = subprocess.run(
            ["bash", SCRIPT, *args],
            env=env,
            cwd=self.path,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        return done.returncode, done.stdout, done.stderr

    def calls(self):
        """What gcloud was asked since the last time, as lists of arguments."""
        path = self.path / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return [json.loads(line) for line in lines]

    def verbs(self):
        """The same, in short: ["create", "ssh all", ...]."""
        short = []
        for call in self.calls():
            verb = call[1] if call[0] == "storage" else call[3]
            worker = [a.partition("=")[2] for a in call if a.startswith("--worker=")]
            short.append(" ".join([verb + (" vm" if call[2:4] == ["tpu-vm", "describe"] else ""), *worker]))
        return short

    def host(self, number, name):
        path = self.path / f"hosts/{number}/{name}"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    if list(tmp_path.glob("hosts/*/dit_jax-run/pid")):
        cloud.plan(life=UP)
        cloud.run("delete")  # ends what runs on the hosts


def printed(text):
    """The gcloud commands among lines, as lists of arguments."""
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("gcloud ")]


def wait_for(condition, what):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_linter():
    """ShellCheck, of the test extra: not there is a failure."""
    shellcheck = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dry_run_of_a_pod_prints_all_and_calls_nothing(cloud):
    flags = [*WHERE, "--type=v3-256", "--spot", "--bucket=gs://my-bucket", "--dry-run"]
    status, out, err = cloud.run("watch", *flags, "--", "--config.data.path=/mnt/bucket/it's here")
    assert (status, err) == (0, "")
    create = next(c for c in printed(out) if "create" in c)
    assert create == [
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "dit",
        "--node-id=dit",
        *WHERE,
        "--accelerator-type=v3-256",
        "--runtime-version=tpu-ubuntu2204-base",
        "--spot",
        "--quiet",
    ]
    # What the hosts run, unpacked as their shell will: the quoting survives.
    train = shlex.split(next(a for a in printed(out)[-1] if a.startswith("--command=")))
    assert train[-3:] == [
        "--config=configs/xl2.py",
        "--workdir=/mnt/bucket/runs/dit",
        "--config.data.path=/mnt/bucket/it's here",
    ]
    commands = printed(out)
    for command in ("create", "install", "train", "status", "logs", "stop", "recover", "fetch", "delete"):
        status, out, err = cloud.run(command, *flags)
        assert (status, err) == (0, "") and printed(out), command
        commands += printed(out)
    commands += printed(cloud.run("fetch", "--workdir=/nfs/run", "--dry-run")[1])
    for command in commands:
        name = next(name for name in FLAGS if command[: len(name.split())] == name.split())
        assert {a.partition("=")[0] for a in command if a.startswith("--")} <= set(FLAGS[name]), command
    assert cloud.calls() == []
    assert sorted(p.name for p in cloud.path.iterdir()) == [
        "bin",
        "bucket",
        "calls.jsonl",
        "flags.json",
        "host-bin",
        "hosts",
        "plan.json",
        "train",
        "uv",
    ]


@pytest.mark.parametrize(
    "type_, accelerator, runtime",
    [
        ("v2-8", "v2-8", "tpu-ubuntu2204-base"),
        ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
        ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5litepod-256", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v6e-16", "v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_types(cloud, type_, accelerator, runtime):
    """Runtime versions: https://cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX"."""
    create = printed(cloud.run("create", f"--type={type_}", "--dry-run")[1])[1]
    assert {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"} <= set(create)
    assert "--spot" not in create
    create = printed(cloud.run("create", f"--type={type_}", "--runtime-version=my-own", "--spot", "--dry-run")[1])[1]
    assert "--runtime-version=my-own" in create and "--spot" in create


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="no gcloud here")
def test_gcloud_parses_what_is_printed(cloud, tmp_path):
    """The real gcloud's own parser, which asks no service: with an empty configuration, so that no account is used."""
    lines = []
    for command in ("recover", "status", "logs", "fetch", "delete"):  # all that there are
        flags = [*WHERE, "--type=v3-256", "--spot", "--bucket=gs://my-bucket", "--dry-run"]
        lines += cloud.run(command, *flags)[1].splitlines()
    lines = {line for line in lines if line.startswith("gcloud ")}
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": line} for line in lines]))
    env = dict(
        os.environ,
        CLOUDSDK_CONFIG=str(tmp_path / "empty"),
        CLOUDSDK_CORE_DISABLE_PROMPTS="1",
        CLOUDSDK_CORE_DISABLE_USAGE_REPORTING="1",
        CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK="1",
    )
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path}/commands.json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    verdicts = json.loads(done.stdout)
    assert len(verdicts) == len(lines) > 10
    assert [v["error_message"] for v in verdicts if not v["success"]] == []


def test_from_create_to_delete(cloud):
    """Two hosts; every step, some of them twice."""
    cloud.plan(lives=[dict(states=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])])
    status, out, err = cloud.run("create", *WHERE, "--type=v5e-16", "--poll=0")
    assert status == 0 and "PROVISIONING" in err and err.endswith("dit is ACTIVE\n")
    calls = cloud.calls()
    assert calls == printed(out)  # what is printed is what is called
    assert [c[3] for c in calls] == ["describe", "create", "describe", "describe", "describe"]
    assert calls[1][4:] == [
        "dit",
        "--node-id=dit",
        *WHERE,
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--quiet",
    ]
    status, out, err = cloud.run("create", *WHERE, "--type=v5e-16")
    assert status == 0 and "dit is there already" in err and cloud.verbs() == ["describe", "describe"]

    assert cloud.run("status")[1].splitlines()[-2:] == ["host: none"] * 2
    assert cloud.run("install")[0] == 0
    assert cloud.verbs() == ["describe", "describe vm", "ssh all", "scp all", "ssh all"]
    for host in (0, 1):
        assert cloud.host(host, "dit_jax/LICENSE") == (ROOT / "LICENSE").read_text()
        venv, pip = cloud.host(host, "installed").splitlines()
        assert "--python >=3.11" in venv and pip.endswith(f"-e {cloud.path}/hosts/{host}/dit_jax[tpu]")

    train = ["train", "--bucket=gs://my-bucket", "--config=configs/b2.py", "--", "--config.data.path=/mnt/bucket/it's"]
    assert cloud.run(*train)[0] == 0
    wait_for(lambda: cloud.host(1, "trained") and cloud.host(0, "trained"), "training starts on both hosts")
    assert cloud.host(1, "trained") == (
        "-m dit_jax.train --config=configs/b2.py --workdir=/mnt/bucket/runs/dit --config.data.path=/mnt/bucket/it's\n"
    )
    assert re.search("^gcsfuse --implicit-dirs .* my-bucket /mnt/bucket$", cloud.host(1, "mounted"), re.M)
    status, _, err = cloud.run(*train)
    assert status == 0 and err.count("is training already") == 2
    assert cloud.run("status")[1].count(": running, start 1\n") == 2
    status, _, err = cloud.run("install")  # would take the code from under the run
    assert status == 1 and "a run is going on" in err

    wait_for(lambda: (cloud.path / "hosts/0/up").exists() and (cloud.path / "hosts/1/up").exists(), "both are at work")
    status, out, _ = cloud.run("stop")
    assert status == 0 and out.count(": stopped on request\n") == 2
    assert [cloud.host(h, "trained").splitlines()[-1] for h in (0, 1)] == ["saved", "saved"]
    assert "start 1: " in cloud.host(0, "dit_jax-run/log") and "status 75" in cloud.host(0, "dit_jax-run/log")

    run = cloud.path / "bucket/runs/dit"
    for step in (900, 1000):
        (run / f"checkpoints/{step}").mkdir(parents=True)
        (run / f"checkpoints/{step}/state").write_text(str(step))
    (run / "checkpoints/1100.orbax-checkpoint-tmp-1").mkdir()
    (run / "metrics.jsonl").write_text("{}")
    assert cloud.run("fetch", "--bucket=gs://my-bucket", "--out=here")[0] == 0
    assert (cloud.path / "here/metrics.jsonl").exists()
    assert [p.name for p in (cloud.path / "here/checkpoints").iterdir()] == ["1000"]
    assert (cloud.path / "here/checkpoints/1000/state").read_text() == "1000"
    # The same from a folder of the first host.
    assert cloud.run("fetch", f"--workdir={run}", "--out=there")[0] == 0
    assert (cloud.path / "there/metrics.jsonl").exists()
    assert [p.name for p in (cloud.path / "there/checkpoints").iterdir()] == ["1000"]

    cloud.calls()
    assert cloud.run("delete", *WHERE)[0] == 0
    assert cloud.calls()[1][3:] == ["delete", "dit", *WHERE, "--force", "--quiet"]
    status, _, err = cloud.run("delete", *WHERE)
    assert status == 0 and err == "dit is not there\n"


def test_quota(cloud):
    refusal = "RESOURCE_EXHAUSTED: Quota limit 'TPUV3sPreemptiblePodPerProjectPerZoneForTPUAPI' has been exceeded."
    cloud.plan(lives=[dict(refused=refusal), dict(states=["PROVISIONING", "FAILED\tno capacity for v3-256"])])
    status, _, err = cloud.run("create", "--type=v3-256", "--poll=0")
    assert status == 1 and refusal in err and err.splitlines()[-1].startswith("error: gcloud did not create dit")
    assert cloud.verbs() == ["describe", "create"]
    status, _, err = cloud.run("create", "--type=v3-256", "--poll=0")
    assert status == 1 and err.splitlines()[-1] == "error: dit: the request FAILED: no capacity for v3-256"
    cloud.calls()
    one_error(cloud.run("create", "--type=v3-256"), "dit", "FAILED", "'delete'", "'recover'")
    assert cloud.verbs() == ["describe"]
    cloud.plan(lives=[dict(states=["PROVISIONING", "SUSPENDED"])])
    status, _, err = cloud.run("create", "--type=v3-256", "--poll=0")
    assert status == 1 and err.splitlines()[-1].startswith("error: dit was suspended before it was there")
    cloud.calls()
    # watch asks again for what had failed, and does not go on when that is refused too.
    cloud.plan(lives=[dict(refused=refusal)], life=dict(states=["FAILED\told"], nodes=["NONE"]))
    status, _, err = cloud.run("watch", "--type=v3-256", "--bucket=gs://my-bucket")
    assert status == 1 and cloud.verbs() == ["describe", "delete", "describe", "create"]


def test_watch_comes_back_after_preemptions_until_the_run_is_done(cloud):
    cloud.plan(
        lives=[
            dict(states=["PROVISIONING", "SUSPENDED"]),
            dict(states=["PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"]),
            dict(states=["ACTIVE"], nodes=["READY", "unavailable", "READY", "REPAIRING", "PREEMPTED"]),
            UP,
        ]
    )
    for host in (0, 1):
        cloud.statuses(host, "stay", "stay", 75, 0)
    status, _, err = cloud.run("watch", *WHERE, "--type=v3-256", "--spot", "--bucket=gs://my-bucket")
    assert status == 0, err
    assert err.splitlines()[-2] == "dit: the run is: done" and "'fetch', then 'delete'" in err.splitlines()[-1]
    assert "dit: SUSPENDED" in err and "the TPU VM is REPAIRING" in err and "the TPU VM is PREEMPTED" in err
    deeds = [verb for verb in cloud.verbs() if not verb.startswith("describe") and verb != "ssh 0"]
    up = ["create", "scp all", "ssh all", "ssh all"]
    assert deeds == ["create", "delete", *up, "delete", *up, "delete", *up]
    assert "running" not in cloud.host(1, "dit_jax-run/status")


@pytest.mark.slow
def test_watch_ends_where_the_run_cannot_go_on(cloud):
    flags = [*WHERE, "--type=v4-16", "--workdir=/nfs/run", "--config=configs/b2.py"]
    cloud.plan(life=UP)
    cloud.statuses(0, 1)
    status, _, err = cloud.run("watch", *flags)
    assert status == 1 and err.splitlines()[-1].startswith(
        "error: the run of dit ended for good: failed, status 1: error: --config=x: is bad"
    )
    # A host that has started anew has no run, but says that there was one: it goes on.
    pid = cloud.path / "hosts/0/dit_jax-run/pid"
    (pid.parent / "status").write_text("running, start 1\n")
    cloud.statuses(0, 0)
    cloud.calls()
    assert cloud.run("watch", *flags)[0] == 0
    assert [verb for verb in cloud.verbs() if verb.startswith(("scp", "ssh all"))] == ["ssh all"]
    assert cloud.run("train", *flags)[0] == 0
    wait_for((cloud.path / "hosts/0/up").exists, "at work")
    assert cloud.run("stop")[0] == 0
    status, _, err = cloud.run("watch", *flags)
    assert status == 1 and "was stopped; 'train' resumes" in err.splitlines()[-1]


def test_recover_once(cloud):
    flags = [*WHERE, "--type=v4-16", "--workdir=/nfs/run"]
    cloud.plan(life=UP)
    status, _, err = cloud.run("recover", *flags)
    assert status == 0 and err == "dit is there: nothing to recover\n"
    assert cloud.verbs() == ["describe", "describe vm"]
    cloud.plan(lives=[UP], life=dict(states=["SUSPENDING", "SUSPENDED"], nodes=["NONE"]))
    assert cloud.run("recover", *flags, "--poll=0")[0] == 0
    assert cloud.verbs() == [
        "describe",
        "describe",
        "delete",
        "describe",
        "create",
        "describe",
        "scp all",
        "ssh all",
        "ssh all",
    ]


@pytest.mark.slow
def test_broken_connections(cloud):
    cloud.plan(life=UP, broken=[255, 1, 0, 255])
    status, _, err = cloud.run("install")
    assert status == 0 and err.count("again in 0 s") == 3
    assert cloud.verbs() == ["scp all"] * 3 + ["ssh all"] * 2
    cloud.plan(life=UP, broken=[255] * 100)
    status, _, err = cloud.run("train", "--workdir=/nfs/run")
    assert status == 1 and cloud.verbs() == ["ssh all"] * 6
    assert err.splitlines()[-1] == "error: train of dit did not succeed on every host: the reason is above"
    cloud.plan(life=UP, broken=[255] * 100)
    status, _, err = cloud.run("watch", "--type=v4-16", "--workdir=/nfs/run")
    assert status == 1 and "failed in three rounds" in err.splitlines()[-1]
    assert cloud.verbs() == (["describe", "describe vm"] + ["ssh 0"] * 6) * 3
    # The service itself: for a while, and for good. Nothing is created or deleted on a guess.
    cloud.plan(life=dict(states=["unavailable"] * 5 + ["ACTIVE"], nodes=["CREATING"]))
    assert cloud.run("status")[1].splitlines()[-1] == "dit: TPU VM CREATING"
    cloud.calls()
    cloud.plan(life=dict(states=["denied"], nodes=["READY"]))
    one_error(cloud.run("status"), "PERMISSION_DENIED")
    assert cloud.verbs() == ["describe"]
    cloud.plan(life=dict(states=["unavailable"], nodes=["READY"]))
    for command in ("status", "create", "recover", "watch", "delete"):
        cloud.calls()
        status, _, err = cloud.run(command, "--type=v4-16", "--workdir=/nfs/run")
        assert status == 1 and "UNAVAILABLE" in err.splitlines()[-1], (command, err)
        assert cloud.verbs() == ["describe"] * 6


@pytest.mark.parametrize(
    "args, words",
    [
        (["create"], ["--type is missing", "--type=v3-256"]),
        (["watch", "--type=v3-256"], ["--workdir or --bucket is missing"]),
        (["recover", "--type=v3-256", "--workdir=/nfs/run", "--config=configs/none.py"], ["--config=configs/none.py"]),
        (["create", "--type=v9x-8"], ["--type=v9x-8", "--runtime-version"]),
        (["create", "--type=big"], ["--type=big"]),
        (["create", "--typ=v4-8"], ["--typ=v4-8"]),
        (["create", "--type"], ["--type", "--flag=VALUE"]),
        (["train", "--config.steps=3", "--workdir=/x"], ["--config.steps=3", "--"]),
        (["train"], ["--workdir or --bucket is missing", "all hosts"]),
        (["train", "--workdir=gs://b/x"], ["--workdir=gs://b/x", "--bucket"]),
        (["train", "--workdir=runs/x"], ["--workdir=runs/x", "absolute"]),
        (["train", "--workdir=/x", "--config=configs/none.py"], ["--config=configs/none.py", "no such file"]),
        (["train", "--bucket=my-bucket"], ["--bucket=my-bucket", "gs://"]),
        (["logs", "--worker=all"], ["--worker=all"]),
        (["create", "--type=v4-8", "--name=Big Pod"], ["--name=Big Pod"]),
        (["watch", "--poll=often"], ["--poll=often"]),
        (["launch"], ["launch: unknown command", "--help"]),
    ],
)
def test_bad_input_is_one_line(cloud, args, words):
    one_error(cloud.run(*args), *words)
    assert cloud.calls() == []


def test_without_gcloud(cloud, tmp_path):
    (tmp_path / "empty").mkdir()
    for program in ("bash", "dirname"):
        (tmp_path / "empty" / program).symlink_to(shutil.which(program))
    done = subprocess.run(
        [shutil.which("bash"), SCRIPT, "status"],
        env={"PATH": str(tmp_path / "empty"), "HOME": "/"},
        capture_output=True,
        text=True,
    )
    one_error((done.returncode, done.stdout, done.stderr), "gcloud", "https://cloud.google.com/sdk/docs/install")


# ---- The supervisor, which runs on the hosts


def supervise(home, program, backoff=0, **env):
    """The loop around a shell program that finds the number of its start in $n."""
    env = dict(os.environ, HOME=str(home), TPU_POD_BACKOFF=str(backoff), **env)
    count = f"n=$(($(cat {home}/n 2>/dev/null || echo 0) + 1)); echo $n >{home}/n; "
    return subprocess.Popen(
        ["bash", SCRIPT, "on-host-supervise", "bash", "-c", count + program],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "statuses, starts, end",
    [
        ("0", 1, "done"),
        ("1 0", 1, "failed, status 1"),  # bad input: another start would not mend it
        ("75 75 0", 3, "done"),
        ("75 139 134 1", 4, "failed, status 1"),
        ("75 " * 9, 4, "failed, status 75: gave up after 3 restarts"),
        ("137 " * 9, 4, "failed, status 137: gave up after 3 restarts"),
    ],
)
def test_supervisor_restarts_what_may_succeed(tmp_path, statuses, starts, end):
    process = supervise(tmp_path, f"s=({statuses}); exit ${{s[n - 1]}}", MAX_RESTARTS="3")
    err = process.communicate(timeout=20)[1]
    assert (tmp_path / "n").read_text() == f"{starts}\n", err
    assert (tmp_path / "dit_jax-run/status").read_text().startswith(end)
    assert process.returncode == int(statuses.split()[starts - 1])


def test_supervisor_counts_anew_after_a_run_that_lasted(tmp_path):
    process = supervise(tmp_path, "[[ $n -le 6 ]] || exit 0; exit 75", MAX_RESTARTS="1", HEALTHY="0")
    assert process.wait(timeout=20) == 0 and (tmp_path / "n").read_text() == "7\n"


# Training that saves at the first SIGTERM and would die of a second one.
SAVES = """trap 'trap - TERM; touch {0}/told; sleep 1.5; echo $n >>{0}/saved; exit 75' TERM; touch {0}/up
while :; do sleep 0.05; done"""


@pytest.mark.parametrize(
    "told",
    [
        "the supervisor",
        "both",
        pytest.param("the supervisor twice", marks=pytest.mark.slow),
        pytest.param("before there is a handler", marks=pytest.mark.slow),
    ],
)
def test_supervisor_passes_sigterm_on_once_and_ends(tmp_path, told):
    """The system, when a host goes down, tells both; a person tells the supervisor."""
    late = "touch {0}/late; sleep 2; " if told.startswith("before") else ""
    process = supervise(tmp_path, "[[ $n -gt 1 ]] || exit 75; " + (late + SAVES).format(tmp_path))
    wait_for((tmp_path / ("late" if late else "up")).exists, "the second start is at work")
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        child = int(f.read())
    process.send_signal(signal.SIGTERM)
    if told == "both":
        os.kill(child, signal.SIGTERM)
    if told == "the supervisor twice":
        wait_for((tmp_path / "told").exists, "the first is passed on")
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "saved").read_text() == "2\n"
    assert (tmp_path / "dit_jax-run/status").read_text() == "stopped, status 75\n"
    assert (tmp_path / "n").read_text() == "2\n"


def test_supervisor_ends_while_it_waits(tmp_path):
    process = supervise(tmp_path, "exit 75", backoff=1000)
    wait_for(
        lambda: (
            (tmp_path / "dit_jax-run/status").exists()
            and "waits 1000 s" in (tmp_path / "dit_jax-run/status").read_text()
        ),
        "the back-off",
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "dit_jax-run/status").read_text() == "stopped, status 75\n"


@pytest.mark.slow
def test_supervisor_of_real_training(tmp_path):
    """What a host runs, with this Python in place of its own: bad input, a run to its end, and nothing left to do."""
    (tmp_path / "dit_jax").symlink_to(ROOT)
    (tmp_path / "dit_jax-venv/bin").mkdir(parents=True)
    python = tmp_path / "dit_jax-venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = dict(os.environ, HOME=str(tmp_path), JAX_PLATFORMS="cpu", XLA_FLAGS="")

    def host(command, *args):
        return (
            subprocess.run(
                ["bash", SCRIPT, f"on-host-{command}", *args], env=env, capture_output=True, text=True, timeout=60
            )
            .stdout.partition(": ")[2]
            .strip()
        )

    def train(*args):
        host("start", *TINY, "--config.steps=3", f"--workdir={tmp_path}/run", *args)
        deadline = time.monotonic() + 120
        while host("status").startswith("running") and time.monotonic() < deadline:
            time.sleep(0.2)
        return host("status")

    assert train("--config.batch_size=0").startswith("failed, status 1: error: batch_size=0")
    assert train() == "done"
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    assert train() == "done" and "resuming from step 3 of 3" in (tmp_path / "dit_jax-run/log").read_text()


# ---- The GKE manifest


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())


def test_manifest_asks_for_the_whole_slice(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod, container = spec["template"]["spec"], spec["template"]["spec"]["containers"][0]
    selectors = pod["nodeSelector"]
    chips = int(np.prod([int(n) for n in selectors["cloud.google.com/gke-tpu-topology"].split("x")]))
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == per_host
    assert job["replicas"] == 1 and spec["parallelism"] == spec["completions"] == chips // per_host > 1
    # The table that says what to change, and the row that is in force.
    text = (ROOT / "launch/gke_jobset.yaml").read_text()
    rows = re.findall(r"^#   (tpu-\S+) +(\d+) +(\S+): (\d+) hosts$", text, re.M)
    assert len(rows) == 5
    for _, per, topology, hosts in rows:
        assert np.prod([int(n) for n in topology.split("x")]) == int(per) * int(hosts)
    assert (
        selectors["cloud.google.com/gke-tpu-accelerator"],
        str(per_host),
        selectors["cloud.google.com/gke-tpu-topology"],
        str(spec["parallelism"]),
    ) in rows
    # A pod that is never started anew by itself, that has time to save, and whose bucket all hosts share.
    assert pod["restartPolicy"] == "Never" and spec["backoffLimit"] == 0 and spec["completionMode"] == "Indexed"
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert spec["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    volume, mount = pod["volumes"][0], container["volumeMounts"][0]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io" and mount["name"] == volume["name"]
    assert any(arg.startswith(f"--workdir={mount['mountPath']}/") for arg in container["command"])


@pytest.mark.parametrize(
    "end, action",
    [
        (1, "FailJobSet"),
        (75, "RestartJobSetAndIgnoreMaxRestarts"),
        ("DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (2, "RestartJobSet"),
        (134, "RestartJobSet"),
        (137, "RestartJobSet"),
    ],
)
def test_manifest_restarts_what_may_succeed(jobset, end, action):
    """The rules, played: the Job controller's (whose messages these are) and JobSet's, first match first. Fields and
    names: https://github.com/kubernetes-sigs/jobset config/components/crd/bases, keps/262-ConfigurableFailurePolicy."""
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes = rule.get("onExitCodes", {"values": []})
        if end in codes["values"]:
            assert codes["containerName"] == spec["template"]["spec"]["containers"][0]["name"]
            message = f"Container train for pod default/dit-slice-0-0-x failed with exit code {end} matching"
        elif [c for c in rule.get("onPodConditions", []) if (c["type"], c["status"]) == (end, "True")]:
            message = f"Pod default/dit-slice-0-0-x has condition {end} matching"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{message} FailJob rule at index {index}"
        break
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 3
    taken = "RestartJobSet"  # where no rule matches
    for rule in policy["rules"]:
        assert set(rule) <= {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"}
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        if reason in rule["onJobFailureReasons"] and any(
            re.search(p, message) for p in rule.get("onJobFailureMessagePatterns", [""])
        ):
            taken = rule["action"]
            break
    assert taken == action


def test_manifest_runs_a_command_that_the_image_holds(jobset, tmp_path):
    """With the files that the Dockerfile copies, and no others: all its flags are taken, and the data is not there."""
    for line in (ROOT / "launch/Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            *sources, to = line.split()[1:]
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, tmp_path / to)
                else:
                    shutil.copy(ROOT / source, tmp_path / to)
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    bucket = container["volumeMounts"][0]["mountPath"]
    python, *args = [arg.replace(bucket, str(tmp_path / "bucket")) for arg in container["command"]]
    assert python == "python"
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH="")
    done = subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    one_error((done.returncode, done.stdout, done.stderr), f"{tmp_path}/bucket/imagenet-latents")


# ---- The notebook


def pictures_of(cell):
    """The sizes of the pictures that a cell shows."""
    return [
        PIL.Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"]))).size
        for output in cell["outputs"]
        if output["output_type"] == "display_data"
    ]


def text_of(cell):
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """notebook(**environment) runs launch/colab.ipynb as it is, in a copy of the checkout and without a network
    -> {title: cell}."""
    for name in ("launch", "dit_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there

    def run(before="", last=None, after=(), **env):
        """before: what the kernel has done already. last: the title of the last cell to run. after: cells after it."""
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        book = nbformat.read(tmp_path / "launch/colab.ipynb", as_version=4)
        book.cells += map(nbformat.v4.new_code_cell, after)
        titles = [re.match("#@title ([^{\n]*)", cell.source) for cell in book.cells]
        titles = [title and title[1].strip() for title in titles]
        if last:
            book.cells, titles = book.cells[: titles.index(last) + 1], titles[: titles.index(last) + 1]
        book.cells.insert(0, nbformat.v4.new_code_cell(before))
        nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path / "launch")}}).execute()
        return {title: cell for title, cell in zip(titles, book.cells[1:]) if title}

    return run


def test_notebook_is_clean():
    """No outputs, counts or machine's metadata in it, and a form over every cell with code."""
    book = nbformat.read(ROOT / "launch/colab.ipynb", as_version=4)
    nbformat.validate(book)
    assert book.metadata.accelerator == "TPU" and set(book.metadata) == {"accelerator", "colab", "kernelspec"}
    for cell in book.cells:
        assert not cell.metadata and cell.cell_type in ("code", "markdown")
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None and cell.source.startswith("#@title ")
    sliders = re.findall(
        r"^(\w+) = ([\d.]+)  #@param {type:\"slider\", min:([\d.]+), max:([\d.]+), step:[\d.]+}$",
        "\n".join(cell.source for cell in book.cells),
        re.M,
    )
    assert len(sliders) == 9 and all(float(low) <= float(value) <= float(high) for _, value, low, high in sliders)


def cell_of(title):
    """The source of a cell of the notebook."""
    book = nbformat.read(ROOT / "launch/colab.ipynb", as_version=4)
    return next(cell.source for cell in book.cells if cell.source.startswith(f"#@title {title}"))


def test_notebook_sees_what_needs_a_restart():
    """Another version loaded than installed, of each package that it looks at; and nothing in a sound process."""
    tree = ast.parse(cell_of("Install"))
    kept = [
        node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or "PACKAGES" in ast.dump(node)
    ]
    scope = {}
    exec(compile(ast.Module([node for node in kept if not isinstance(node, ast.If)], []), "cell", "exec"), scope)
    outdated, packages = scope["outdated"], scope["PACKAGES"]
    for module in packages:
        importlib.import_module(module)
    assert outdated(sys.modules, importlib.metadata.version) == []
    for module, distribution in packages.items():
        loaded = {module: types.SimpleNamespace(__version__="2.1.3")}
        installed = importlib.metadata.version(distribution)
        assert outdated(loaded, importlib.metadata.version) == [(distribution, "2.1.3", installed)]
    assert outdated({}, importlib.metadata.version) == []
    assert scope["RestartNeeded"]("what to do")._render_traceback_() == ["what to do"]


@pytest.mark.slow
def test_notebook_stops_where_a_restart_is_needed(notebook, tmp_path):
    """A kernel that has loaded another NumPy: the install's cell says so, and no cell after it runs."""
    with pytest.raises(
        nbclient.exceptions.CellExecutionError, match="(?s)RESTART NEEDED: .*numpy 2.1.3.*Restart session"
    ):
        notebook(before="import numpy; numpy.__version__ = '2.1.3'")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_notebook_trains_the_small_model_and_samples(notebook, tmp_path):
    changes = {"steps": 4, "batch_size": 8, "log_every": 1, "judge.samples": 20}
    changes |= {
        "model.depth": 2,
        "model.hidden_size": 32,
        "sample.every": 4,
        "sample.per_class": 2,
        "sample.steps": "5",
    }
    count = "compiled = []\njax.monitoring.register_event_duration_secs_listener(\n    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None)"
    moved = re.sub("(digit|guidance|seed) = [0-9.]+", r"\1 = 4", cell_of("Digits"))  # three of its sliders
    cells = notebook(
        after=[
            count,
            moved.replace("Digits", "Moved"),
            "#@title again\nprint(len(compiled))\njax.jit(lambda x: x + 5)(1.0)\nprint(len(compiled) > 0)",
        ],
        DIT_JAX_COLAB_CHANGES=json.dumps(changes),
        DIT_JAX_COLAB_WEIGHTS="",
    )
    assert "The published weights cannot be had (" in text_of(cells["Published weights, where they can be had"])
    run = tmp_path / "runs/colab"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert json.loads((run / "report.json").read_text())["samples"] == 20
    training = cells["Train, and watch the loss"]
    assert "done: step 4" in text_of(training)
    [curve] = pictures_of(training)
    assert curve[0] > 400
    assert pictures_of(cells["Digits, as they form"]) == [dit_jax.grid(np.zeros((16, 8, 8, 3), np.uint8), 8).size]
    assert text_of(cells["again"]) == "0\nTrue\n"
    assert "nothing to draw" in text_of(cells["ImageNet, with the published DiT-XL/2"])


@pytest.mark.slow
def test_notebook_takes_published_weights(notebook, tmp_path):
    """Weights of the published format and DiT-S's width, which tells the number of heads."""
    args = dict(patch_size=2, depth=1, hidden_size=384, num_heads=6, input_size=8, in_channels=4, num_classes=1000)
    rng = np.random.default_rng(0)
    flat = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in published_shapes(args).items()}
    np.savez(tmp_path / "weights.npz", **flat)
    cells = notebook(last="ImageNet, with the published DiT-XL/2", DIT_JAX_COLAB_WEIGHTS=tmp_path / "weights.npz")
    assert "Published weights: weights.npz" in text_of(cells["Published weights, where they can be had"])
    assert "latents are shown" in text_of(cells["Published weights, where they can be had"])
    cell = cells["ImageNet, with the published DiT-XL/2"]
    assert "Latents, not pictures" in text_of(cell) and pictures_of(cell) == [dit_jax.grid(np.zeros((1, 8, 8, 4))).size]
