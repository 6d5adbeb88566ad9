"""Where the time goes: a trace of some steps (--profile)."""

import contextlib
import re

import jax

from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say


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
