"""Processes that are timed in turn, each alone in its memory, and idle while another is timed.

    with Child("benchmarks.speed.jax_side", {"what": "train", ...}) as child:  # it sets up and compiles
        child.info, child.ask(calls=3)["seconds"]                              # of one call

Each message is JSON on a line. The child reads its spec, and answers with what it says of itself. Then it reads a
number of calls, and answers how long one took; or it reads "profile", and answers what a call's time goes to. It ends
with its standard input. Neither JAX nor PyTorch is imported here, because each side imports its own.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks import ROOT
from dit_jax.runtime.process import MALLOC, end_with_parent


def peak_memory():
    """Returns the most bytes that this process has held at once."""
    try:
        with open("/proc/self/status") as f:  # on Linux, getrusage's figure may be the parent's
            return 1024 * int(next(line for line in f if line.startswith("VmHWM")).split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass
class Timed:
    """What a child times.

    call(): makes one call and waits for it. It returns None, or a dict of results, whose "seconds" and "memory" replace
    what is measured here. info: plain values. rate(): FLOP/s of a large matrix product, or None where that says
    nothing. memory(): the peak so far, in bytes. profile(): what profile.profile returns of one call, or None.
    """

    call: Callable
    info: dict = field(default_factory=dict)
    rate: Callable = lambda: None
    memory: Callable = peak_memory
    profile: Callable = lambda: None


def serve(make):
    """Runs the child's main loop. make(spec) returns a Timed. Its ValueError, or a call's, goes to the parent."""
    end_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not get among the lines

    def say(message):
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        timed = make(json.loads(sys.stdin.readline()))
        say(timed.info)
        for line in sys.stdin:
            calls, start = json.loads(line), time.perf_counter()
            if calls == "profile":
                say(timed.profile())
                continue
            results = [timed.call() or {} for _ in range(calls)]
            seconds = (time.perf_counter() - start) / calls
            say({"seconds": seconds, "rate": timed.rate(), "memory": timed.memory(), **results[-1]})
    except ValueError as e:
        say({"error": str(e)})


class ChildError(Exception):
    """What a child could not do, in one line."""


class Child:
    """The parent's end of a process `python -m module`. Raises ChildError.

    info: what the process said of itself. plain: whether it runs without our settings of malloc, as its user would run
    it.
    """

    def __init__(self, module, spec, plain=False):
        self.module = module
        env = {k: v for k, v in os.environ.items() if not (plain and (k, v) == ("GLIBC_TUNABLES", MALLOC))}
        # The module is found in this checkout, whatever folder the user is in.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, env.get("PYTHONPATH")]))
        # JAX otherwise takes three quarters of a GPU's memory at once, and nothing fits beside it.
        env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        # In a group of its own Ctrl-C does not reach it: the parent ends it.
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            process_group=0,
        )
        assert self.process.stdin and self.process.stdout
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        try:
            self.info = self._exchange(spec)
        except BaseException:
            self.close()
            raise

    def ask(self, calls=1):
        """Returns {"seconds": of one call, "rate": FLOP/s or None, "memory": the peak so far in bytes, ...}."""
        return self._exchange(calls)

    def _exchange(self, message):
        try:
            self._stdin.write(json.dumps(message) + "\n")
            self._stdin.flush()
            line = self._stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ChildError(
                f"{self.module} ended with status {self.process.wait()}"
                + (", as where memory runs out" if self.process.returncode == -signal.SIGKILL else "")
            )
        answer = json.loads(line)
        if answer and "error" in answer:
            raise ChildError(answer["error"])
        return answer

    def profile(self):
        """Returns what profile.profile returns of one call; None where that is not known."""
        return self._exchange("profile")

    def cpu_seconds(self):
        """Returns the processor time so far, None where /proc does not tell. An idle child's disturbs the others."""
        try:
            with open(f"/proc/{self.process.pid}/stat") as f:
                user, system = f.read().rpartition(")")[2].split()[11:13]
        except OSError:
            return None
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self):
        """Kills the process, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
