"""metrics.jsonl of a run, TensorBoard where it is installed, and the loss curve."""

import io
import json
import os

import jax

from dit_jax.runtime.files import append, reading, write_aside

LINE = 2**20  # characters: no record has so many


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


def loss_curve(records, path):
    """records: dicts with step, loss, mse, vb; and some with step and a Fréchet distance, as in "fid_5000", which get a
    curve of their own."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    losses = [r for r in records if {"loss", "mse", "vb"} <= r.keys()]
    steps = [r["step"] for r in losses]
    distances = sorted({key for r in records for key in r if key.startswith(("fid_", "fd_"))})
    figure, panels = plt.subplots(1 + bool(distances), figsize=(8, 4.5 + 2.5 * bool(distances)), layout="constrained",
                                  sharex=True, squeeze=False)
    axes = panels[0, 0]
    for name, label in (("loss", "loss"), ("mse", "mean-squared error on epsilon"), ("vb", "bound, bits/dim")):
        axes.plot(steps, [r[name] for r in losses], label=label, marker="." if len(steps) < 30 else None)
    axes.set(xlabel="step", ylabel="mean over the interval", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    for key in distances:
        panels[1, 0].plot(*zip(*((r["step"], r[key]) for r in records if key in r)), label=key, marker=".")
        panels[1, 0].grid(alpha=0.3)
        panels[1, 0].legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    write_aside(path, file.getvalue())
