"""What a command prints: lines, and progress with rate and time left."""

import sys
import time

import jax


def say(text):
    """One line, from the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def duration(seconds):
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere; with rate and time left."""

    def __init__(self, what, total, unit, done=0, every=10.0):
        self.what, self.total, self.unit, self.first, self.every = what, total, unit, done, every
        self.start, self.last = None, time.perf_counter()
        self.bar = None
        if sys.stderr.isatty() and jax.process_index() == 0:
            from tqdm import tqdm
            self.bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", leave=False, dynamic_ncols=True)

    def update(self, done, text=""):
        now = time.perf_counter()
        if self.start is None:  # what came before the first step is compilation
            self.start, self.first = now, done
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.last >= self.every and self.first < done < self.total:
            self.last = now
            rate = (done - self.first) / (now - self.start)
            say(f"{self.what}: {done}/{self.total} {self.unit}, {rate:.3g}/s, {duration((self.total - done) / rate)} left")

    def say(self, text):
        """A line that stays."""
        self.last = time.perf_counter()
        if self.bar is not None:
            self.bar.write(text)
        else:
            say(text)

    def close(self):
        if self.bar is not None:
            self.bar.close()
