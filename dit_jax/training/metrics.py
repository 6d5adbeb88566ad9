"""The metrics of a run: metrics.jsonl, TensorBoard events if tensorboardX is installed, and the loss curve."""

import json
import os
from typing import Any

import jax

from dit_jax.runtime.files import append, reading, write_aside
from dit_jax.runtime.plots import plots

MAX_LINE = 2**20  # characters; every record is shorter

# The losses of the objectives: {name in a record: what it is}.
LOSSES = {
    "loss": "loss",
    "mse": "mean-squared error",
    "vb": "bound, bits/dim",
    "direction": "1 - cosine",
}

Record = dict[str, Any]  # {"step": int, name: number, ...}


class Metrics:
    """metrics.jsonl of a run, one record a line, with TensorBoard events beside it. Only the first process writes.

    Args:
      workdir: the run directory.
      step: the run resumes after this step; records of later steps are dropped.
    Attributes: records (all that are on file), main (whether this is the first process).
    """

    def __init__(self, workdir: str, step: int):
        self.path = os.path.join(workdir, "metrics.jsonl")
        self.records = [r for r in read_records(self.path) if r["step"] <= step]
        self.main, self.board = jax.process_index() == 0, None
        if not self.main:
            return
        write_aside(self.path, "".join(json.dumps(r) + "\n" for r in self.records).encode())
        try:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        except ImportError:
            return
        self.board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a record of `step`."""
        self.records.append({"step": step, **values})
        if not self.main:
            return
        append(self.path, (json.dumps(self.records[-1]) + "\n").encode())
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def read_records(path: str) -> list[Record]:
    """The records of a metrics.jsonl; none if there is no file. A broken line, as a kill may leave, is skipped."""
    if not os.path.exists(path):
        return []
    records = []
    with reading(path, "records"), open(path, errors="replace") as f:
        while line := f.readline(MAX_LINE):
            if len(line) == MAX_LINE:  # another kind of file, perhaps an endless one
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_record(record):
                records.append(record)
    return records


def _is_record(record):
    """Whether this is a record as Metrics writes it."""
    return (
        isinstance(record, dict)
        and type(record.get("step")) is int
        and all(type(v) is float or type(v) is int and abs(v) < 2**63 for v in record.values())
    )


def loss_curve(records: list[Record], path: str) -> None:
    """Draws a picture of the records' losses (LOSSES) over the training steps, with the last values in the legend.

    It begins after the first 1 % of the steps so far, whose losses are many times larger. Fréchet distances, such as
    "fid_5000", get a panel of their own.
    """
    last = max((r["step"] for r in records), default=0)
    records = [r for r in records if r["step"] > last / 100 or r["step"] == last]
    losses = [r for r in records if "loss" in r]
    distances = sorted({key for r in records for key in r if key.startswith(("fid_", "fd_"))})
    with plots(path, 1 + bool(distances), height=3.4, xlabel="training step") as panels:
        for name, label in LOSSES.items():
            if name == "loss" or losses and all(name in r for r in losses):
                _curve(panels[0], losses, name, label)
        panels[0].set(ylabel="mean since the last record", yscale="log")
        for key in distances:
            _curve(panels[1], records, key, key)
            panels[1].set(ylabel="Fréchet distance")
        for panel in panels:
            panel.locator_params("x", nbins=5, integer=True)
            if panel.lines:
                panel.legend()


def _curve(axes, records, name, label):
    """Draws the values of `name`, their last one as a point whose value the legend has."""
    points = [(r["step"], r[name]) for r in records if name in r]
    if not points:
        return
    steps, values = zip(*points)
    axes.plot(
        steps,
        values,
        label=f"{label}: {values[-1]:.4g} at step {steps[-1]:,}",
        marker="o",
        markersize=4,
        markevery=None if len(steps) < 30 else [-1],
    )
