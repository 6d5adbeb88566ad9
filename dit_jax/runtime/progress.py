"""What a command prints: lines, progress with rate and time left, and what it waits for where it is silent."""

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax


class Silence:
    """Breaks the silence: while something goes on and nothing is printed, says what goes on, and for how long.

    On a terminal that is a moving line or bar, each second. Elsewhere it is a line after 10 seconds, and then every 30.

    Attributes:
      quiet: says nothing; on all hosts but the first.
      stream: where lines go; None for stdout.
    """

    FIRST, AGAIN, TICK = 10.0, 30.0, 1.0  # seconds

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.quiet = clock, False
        self.stream: TextIO | None = None
        self._tasks: list[tuple[str, float]] = []  # what goes on, the innermost last, and since when
        self._note: tuple[str, float, Any] | None = None  # of a Progress in it: text, since when, bar or None
        self._heard = self._said = clock()  # when something was printed, when this class printed a line
        self._moving = False  # a line is shown that moves

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Names what goes on in the block. Empty: it may take as long as it likes, as a server does."""
        task, before, self._note = (what, self.clock()), self._note, None
        self._tasks.append(task)
        if len(self._tasks) == 1:
            self.hear()
            threading.Thread(target=self._watch, args=(ended := threading.Event(),), daemon=True).start()
            self._ended = ended
        try:
            yield
        finally:
            self._clear()
            self._tasks.remove(task)
            self._note = before
            if not self._tasks:
                self._ended.set()

    def note(self, text: str | None, bar: Any = None) -> None:
        """Says how far the innermost task is. bar: of tqdm, which is shown."""
        self._note = (text, self.clock(), bar) if text else None
        self.hear()

    def hear(self) -> None:
        """Is called before something is printed."""
        self._clear()
        self._heard, self._said = self.clock(), float("-inf")

    def tick(self) -> None:
        """Is called every TICK."""
        now, tasks = self.clock(), self._tasks
        what, since, bar = self._note or (*(tasks[-1] if tasks else ("", now)), None)
        if self.quiet or not what:
            return
        text = f"{what} ({duration(now - since)})"
        if sys.stderr.isatty():
            if bar is not None:
                bar.refresh()  # moves its time
            elif now - self._heard >= 1:
                self._moving = True
                print(f"\r{text}\x1b[K", end="\r", file=sys.stderr, flush=True)
        elif now - self._heard >= self.FIRST and now - self._said >= self.AGAIN:
            self._said = now
            print(text, file=self.stream, flush=True)

    def _watch(self, ended):
        while not ended.wait(self.TICK):
            with contextlib.suppress(Exception):  # a stream without a reader: the next line of the command fails
                self.tick()

    def _clear(self):
        if self._moving:
            self._moving = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


silence = Silence()
waiting = silence.doing


def say(text: str) -> None:
    """Prints a line, on the first host only."""
    if jax.process_index() == 0:
        silence.hear()
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
        silence.note(f"{what}: compiling, before the first of {total} {unit}", self.bar)

    def update(self, done: int, text: str = "") -> None:
        """Says that `done` units are done, counted from 0. text: stands behind the bar."""
        now = time.perf_counter()
        silence.note(f"{self.what}: {done}/{self.total} {self.unit}, still working", self.bar)
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
            silence.hear()
            self.bar.write(text)
        else:
            say(text)

    def close(self) -> None:
        """Removes the bar."""
        silence.note(None)
        if self.bar is not None:
            self.bar.close()
