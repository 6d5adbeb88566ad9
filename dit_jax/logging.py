"""What a run says: progress on the terminal, metrics.jsonl, TensorBoard where it is installed."""

import json
import os
import sys
import time

import jax

from dit_jax.runtime.files import append, reading, write_aside

LINE = 2**20  # characters: no record has so many


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


class Metrics:
    """metrics.jsonl of a workdir, one record a line, and TensorBoard events beside it. Records of steps after
    `step`, from which the run goes on, are dropped. `records` holds what is on file."""

    def __init__(self, workdir, step):
        self.path = os.path.join(workdir, "metrics.jsonl")
        self.records = [r for r in read_records(self.path) if r["step"] <= step]
        self.main, self.board = jax.process_index() == 0, None
        if not self.main:
            return
        write_aside(self.path, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step, values):
        self.records.append({"step": step, **values})
        if not self.main:
            return
        append(self.path, (json.dumps(self.records[-1]) + "\n").encode())
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def read_records(path):
    """The records of a metrics.jsonl. A line that is broken, as a kill may cut the last one short, is left out."""
    if not os.path.exists(path):
        return []
    records = []
    with reading(path, "records"), open(path, errors="replace") as f:
        while line := f.readline(LINE):
            if len(line) == LINE:  # no file of records, and it may have no end
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_record(record):
                records.append(record)
    return records


def _is_record(record):
    """{"step": int, name: number, ...}, as Metrics writes them."""
    return isinstance(record, dict) and type(record.get("step")) is int and all(
        type(v) is float or type(v) is int and abs(v) < 2**63 for v in record.values())
