"""A profile of some training steps (--profile)."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say


class Trace:
    """Writes a trace of the steps of --profile=START:STOP, on every host.

    Args:
      text: "START:STOP"; None for no trace.
      folder: where the trace goes.
      first, last: the steps of this process.
    Raises: UserError if the text is not two steps of the run.
    """

    def __init__(self, text: str | None, folder: str, first: int, last: int):
        self.start, self.stop, self.folder, self.running = None, None, folder, False
        if text is None:
            return
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match:
            raise UserError(f"--profile={text}: must be START:STOP, two steps, as in --profile=20:25")
        self.start, self.stop = map(int, match.groups())
        if not 1 <= self.start <= self.stop <= last:
            raise UserError(f"--profile={text}: START must not be after STOP, and the run's steps are 1 to {last}")
        if self.start < first:  # the same command must be able to resume the run after its trace
            say(f"--profile={text}: the run is already at step {first - 1}; no trace")
            self.start = self.stop = None

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The block runs this step. Starts the trace if it is START."""
        if step == self.start:
            jax.profiler.start_trace(self.folder)
            self.running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, values: Any) -> None:
        """Stops the trace if this step is STOP. values: arrays that the step computes."""
        if step == self.stop:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Stops the trace if it runs."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            say(
                f"the trace of the steps from {self.start} is in {self.folder}: pip install xprof, then "
                f"xprof --logdir={self.folder}"
            )
