"""Where the time goes: traces of some steps, and programs that need not be compiled twice."""

import contextlib
import hashlib
import os
import platform
import re
import time
import warnings

import jax

from dit_jax.config import UserError
from dit_jax.logging import say


def keep_compiled(shared=None):
    """What XLA compiles is kept for the next start: in ~/.cache/dit_jax, or, where several hosts run one program, which
    the first of them writes, in the folder `shared`. JAX's own JAX_COMPILATION_CACHE_DIR goes first. Several hosts on CPU: nothing."""
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # There each host has another key, and only the first writes: it alone would find its program, and then wait for
        # the others, which compile, longer than Gloo waits.
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    kind = jax.default_backend()
    if kind == "cpu":  # a program for one CPU may not run on another, and JAX does not tell them apart
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
            features = re.search(r"^(flags|Features)\s*:.*$", f.read(), re.MULTILINE)
            kind += "-" + hashlib.sha256(f"{platform.machine()} {features and features[0]}".encode()).hexdigest()[:12]
    folder = os.path.join(shared if shared and jax.process_count() > 1 else os.path.join(home, "dit_jax"), kind)
    with contextlib.suppress(OSError):  # a home that cannot be written: no cache
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", folder)
            # By default what took less than a second is not kept, such as the fingerprints of a checkpoint.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
            # An entry that a kill cut short, or a full disk, is no matter of the user's: the program is compiled anew.
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file() and not entry.stat().st_size and time.time() - entry.stat().st_mtime > 60:
                        os.remove(entry.path)  # else it would stay so for good


class Trace:
    """--profile=START:STOP: a trace of the steps START to STOP, on every host, in `folder`. With no text, none.
    first: the step at which the run goes on; last: its last."""

    def __init__(self, text, folder, first, last):
        self.start, self.stop, self.folder, self.running = None, None, folder, False
        if text is None:
            return
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match:
            raise UserError(f"--profile={text}: START:STOP, two steps, as in --profile=20:25")
        self.start, self.stop = map(int, match.groups())
        if not 1 <= self.start <= self.stop <= last:
            raise UserError(f"--profile={text}: START must not be after STOP, and the run's steps are 1 to {last}")
        if self.start < first:  # a run that goes on must not fail over a trace that it has made, or missed, before
            say(f"--profile={text}: the run is at step {first - 1} already; no trace")
            self.start = self.stop = None

    @contextlib.contextmanager
    def step(self, step):
        if step == self.start:
            jax.profiler.start_trace(self.folder)
            self.running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step, values):
        if step == self.stop:
            jax.block_until_ready(values)
            self.close()

    def close(self):
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            say(f"the trace of the steps from {self.start} is in {self.folder}: pip install xprof, then "
                f"xprof --logdir={self.folder}")
