"""Processes that are timed in turn, each alone in its memory, and idle while another is timed.

    with Child("dit_jax.timing.ours", {"what": "train", ...}) as child:  # it sets up and compiles
        child.info, child.ask(calls=3)["seconds"]                        # of one call

One JSON object a line: the spec in, what the process says of itself out; then a number of calls in, how long they took
out, or "profile" in, what the call's time goes to out, until its standard input ends. Neither JAX nor PyTorch here:
each side imports its own.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Callable

from dit_jax import cli


def peak_memory():
    """The most bytes that this process has held at once."""
    try:
        with open("/proc/self/status") as f:  # on Linux, getrusage's figure may be the parent's
            return 1024 * int(next(line for line in f if line.startswith("VmHWM")).split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass
class Timed:
    """What a child times.

    call(): one call, waited for; None, or a dict of results, whose "seconds" and "memory" go before what is measured
    here. info: plain values. rate(): FLOP/s of a large matrix product, None where that tells nothing. memory():
    the peak so far, bytes. profile(): as timing.profile has it, of one call, or None.
    """
    call: Callable
    info: dict = field(default_factory=dict)
    rate: Callable = lambda: None
    memory: Callable = peak_memory
    profile: Callable = lambda: None


def serve(make):
    """The child's main loop. make(spec) -> Timed; its ValueError, and the calls', go to the parent as text."""
    cli.end_with_parent()
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
    """The parent's end of a process `python -m module`. info: what it said of itself. plain: without our settings of
    malloc, as its user would run it. Raises ChildError."""

    def __init__(self, module, spec, plain=False):
        self.module = module
        env = {k: v for k, v in os.environ.items() if not (plain and (k, v) == ("GLIBC_TUNABLES", cli.MALLOC))}
        # In a group of its own Ctrl-C does not reach it: the parent ends it.
        self.process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=env, process_group=0)
        try:
            self.info = self._exchange(spec)
        except BaseException:
            self.close()
            raise

    def ask(self, calls=1):
        """-> {"seconds": of one call, "rate": FLOP/s or None, "memory": bytes at most so far, ...}"""
        return self._exchange(calls)

    def _exchange(self, message):
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ChildError(f"{self.module} ended with status {self.process.wait()}"
                             + (", as where memory runs out" if self.process.returncode == -signal.SIGKILL else ""))
        answer = json.loads(line)
        if answer and "error" in answer:
            raise ChildError(answer["error"])
        return answer

    def profile(self):
        """What a call's time goes to, as timing.profile has it; None where that is not known."""
        return self._exchange("profile")

    def cpu_seconds(self):
        """Processor time so far, None where /proc does not tell: what an idle child takes disturbs the others."""
        try:
            with open(f"/proc/{self.process.pid}/stat") as f:
                user, system = f.read().rpartition(")")[2].split()[11:13]
        except OSError:
            return None
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it has started
        self.process.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
