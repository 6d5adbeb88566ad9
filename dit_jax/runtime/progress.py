"""What a command prints: lines, and progress with rate and time left."""

import sys
import time
import warnings
from typing import Any

import jax


def say(text: str) -> None:
    """Prints a line, on the first host only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """Returns a time as text: "3 s", "2 min 05 s", "7 h 30 min", "2 d 5 h"."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class Progress:
    """Shows progress, rate and time left: as a bar on a terminal or in a notebook, elsewhere as a line now and then.

    what: the name of the work. total: the number of units. done: how many are done already. every: seconds between
    lines.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0, every: float = 10.0):
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.start: float | None = None  # when the first unit was done: compiling comes before it
        self.first = done  # how many were done then
        self.last = time.perf_counter()  # when a line was printed
        self.bar: Any = None
        if jax.process_index() == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            with warnings.catch_warnings(action="ignore"):  # a notebook without ipywidgets gets a bar of text
                from tqdm.auto import tqdm
            self.bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", leave=False, dynamic_ncols=True)

    def update(self, done: int, text: str = "") -> None:
        """Says that `done` units are done, counted from 0. text: stands behind the bar."""
        now = time.perf_counter()
        if self.start is None:
            self.start = self.last = now
            self.first = done
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.last >= self.every and self.first < done < self.total:
            self.last = now
            rate = (done - self.first) / (now - self.start)
            left = duration((self.total - done) / rate)
            say(f"{self.what}: {done}/{self.total} {self.unit}, {rate:.3g}/s, {left} left")

    def say(self, text: str) -> None:
        """Prints a line that stays above the bar."""
        self.last = time.perf_counter()
        if self.bar is not None:
            self.bar.write(text)
        else:
            say(text)

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()
