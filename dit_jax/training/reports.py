"""What a run reports every N steps: records, meta of checkpoints, grids, evaluation, the loss curve; and at its end."""

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dit_jax.data.pipeline import Batches
from dit_jax.data.sources import Arrays
from dit_jax.evaluation import classifier
from dit_jax.parallel import chips
from dit_jax.runtime import hosts, images as pictures
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import Progress, duration, say, waiting
from dit_jax.training.metrics import LOSSES, Metrics, Record, loss_curve
from dit_jax.training.setup import Run, grid_labels
from dit_jax.weights import snapshots
from dit_jax.weights.checkpoint import Checkpoints


class Reports:
    """The reports of a run, written into `workdir`.

    The values of a step stay on the devices until read_values. A record is the mean over the steps since the last
    record, even if the run was stopped in between: the meta of a checkpoint keeps their values.

    Args:
      first: the step after which the run starts or resumes.
      meta: of the checkpoint it resumes from (training.setup.restore_or_init).
      on_log: called after each record with all records so far, in every process.
    Attribute: pending, the values of steps that are not read yet.
    """

    def __init__(
        self,
        run: Run,
        workdir: str,
        checkpoints: Checkpoints,
        first: int,
        meta: dict[str, Any],
        on_log: Callable[[list[Record]], object] | None = None,
    ):
        self.on_log = on_log
        self.run, self.workdir, self.checkpoints, self.meta = run, workdir, checkpoints, meta
        self.steps = run.config["steps"]
        self.metrics = Metrics(workdir, first)
        if jax.process_index() == 0:
            snapshots.remove_later(workdir, first)
        self.progress = Progress("train", self.steps, "steps", done=first)
        self.pending: list[dict[str, jax.Array]] = []
        self.unlogged: list[dict[str, float]] = meta.get("unlogged", [])
        self.start, self.trained_before = time.perf_counter(), meta["train_seconds"]
        self.restart_clock(first)

    def restart_clock(self, step: int, batches: Batches | None = None) -> None:
        """Measures the rate and the data wait of the next record from here."""
        self.clock_start, self.clock_step = time.perf_counter(), step
        if batches:
            batches.waited = 0.0

    def seconds(self) -> float:
        """Seconds that this run has trained, without the time in which it was stopped."""
        return self.trained_before + time.perf_counter() - self.start

    def read_values(self, step: int) -> None:
        """Reads the pending values, up to those of `step`. To be called before a checkpoint is saved.

        Raises UserError if a value is not finite, or OSError if the last checkpoint could not be written.
        """
        values = [{name: float(x) for name, x in v.items()} for v in jax.device_get(self.pending)]
        self.pending = []
        self.unlogged += values
        self._check_finite(values, step)
        self.checkpoints.check()

    def _check_finite(self, values, last):
        for step, v in enumerate(values, last - len(values) + 1):
            if all(map(math.isfinite, v.values())):
                continue
            self.checkpoints.wait()
            steps, good = self.checkpoints.steps(), "no checkpoint was written"
            if steps:
                good = f"the last good checkpoint is step {max(steps)} in {self.checkpoints.directory}"
            rate = self.run.config["optimizer"]["learning_rate"]
            raise UserError(
                f"step {step}: the loss is {v['loss']}, the gradient's norm {v['grad_norm']}, the parameters' "
                f"{v['param_norm']}; {good}. Lower optimizer.learning_rate ({rate}) or look at the data"
            )

    def log(self, step: int, batches: Batches) -> None:
        """Writes a record of the steps since the last one to metrics.jsonl, and prints a line."""
        now = time.perf_counter()
        seconds = now - self.clock_start
        rate = (step - self.clock_step) / seconds
        images = rate * self.run.config["batch_size"]
        record = {name: float(np.mean([v[name] for v in self.unlogged if name in v])) for name in self.unlogged[-1]}
        record |= {
            "steps_per_second": rate,
            "images_per_second": images,
            "data_wait": batches.waited / seconds,
            "mfu": self.run.mfu(images),
        }
        memory, peak = "", chips.peak_memory()
        if peak:
            record["peak_memory_gib"] = peak / chips.GIB
            memory = f"  {record['peak_memory_gib']:.3g} GiB"
        self.metrics.write(step, record)
        self.unlogged = []
        if self.on_log:
            self.on_log([dict(record) for record in self.metrics.records])
        self.restart_clock(step, batches)
        self.progress.update(step, f"loss {record['loss']:.4f}, {images:.0f} img/s, MFU {record['mfu']:.0%}")
        wait = f"  waited for data {record['data_wait']:.0%}" if record["data_wait"] > 0.05 else ""
        losses = "  ".join(f"{name} {record[name]:.4f}" for name in LOSSES if name in record)
        self.progress.say(
            f"step {step}/{self.steps}  {losses}  "
            f"{rate:.3g} steps/s  {images:.4g} images/s  MFU {record['mfu']:.0%}{memory}  "
            f"{duration((self.steps - step) / rate)} left{wait}"
        )

    def run_meta(self) -> dict[str, Any]:
        """What the meta of a checkpoint or a snapshot says of the run."""
        return {
            "config": self.run.config,
            "data": self.run.source.identity,
            "class_names": self.run.source.class_names,
            "init": self.meta.get("init"),
            "versions": {"jax": jax.__version__},
        }

    def checkpoint_meta(self) -> dict[str, Any]:
        """The meta of a checkpoint that is saved now."""
        return self.run_meta() | {"train_seconds": self.seconds(), "unlogged": self.unlogged}

    def write_snapshot(self, step: int, averages: dict[str, Any]) -> None:
        """Writes averages/snapshots/STEP.npz. To be called before a checkpoint of this step is saved.

        So the steps up to a checkpoint have their snapshots, wherever the run is killed.
        """
        snapshots.write_snapshot(self.workdir, step, averages, self.run_meta())

    @waiting("making the samples of the grid")
    def draw_grid(self, step: int, ema: Any) -> None:
        """Writes samples/STEP.png: config.sample.per_class samples of each of the first classes, a row a class."""
        assert self.run.generator is not None
        labels, columns = grid_labels(self.run.config), self.run.config["sample"]["per_class"]
        images = self.run.generator(ema, labels, np.arange(len(labels)))
        images = self.run.decode(images) if self.run.decode else images
        if jax.process_index() == 0:
            path = os.path.join(self.workdir, "samples", f"{step:08d}.png")
            names = self.run.source.class_names
            texts = pictures.class_labels(labels, names) if self.run.config["model"]["num_classes"] else None
            write_aside(path, pictures.png(pictures.grid(pictures.to_uint8(images), columns, texts)))

    def evaluate_if_due(self, step: int, ema: Any) -> bool:
        """Measures FID or other metrics if config.eval asks for it at this step. Returns whether it was measured.

        A step that has a record is not measured again. A run that was stopped after a checkpoint and before its
        evaluation measures when it resumes.
        """
        every = self.run.config["eval"]["every"]
        if not every or not step or (step % every and step < self.steps):
            return False
        if hosts.share(any(r["step"] == step and "loss" not in r for r in self.metrics.records))[0]:
            return False
        assert self.run.evaluation is not None
        values, line = self.run.evaluation(ema)
        if values:
            self.metrics.write(step, values)
        self.progress.say(f"step {step}/{self.steps}  {line}")
        return True

    def draw_curve(self) -> None:
        """Writes loss.png."""
        if self.metrics.main:
            loss_curve(self.metrics.records, os.path.join(self.workdir, "loss.png"))

    def close(self) -> None:
        """Removes the progress bar."""
        self.progress.close()


@waiting("making and measuring the samples of report.json")
def closing_measurement(run: Run, ema: Any, train_seconds: float, workdir: str) -> None:
    """Writes report.json: how a classifier, fitted on the real training pictures, sees samples of all classes in turn.

    Raises UserError if the samples are not finite.
    """
    train, held_out, generator, count = run.source, run.held_out, run.generator, run.config["judge"]["samples"]
    assert generator and isinstance(train, Arrays) and isinstance(held_out, Arrays)
    labels = np.arange(count) % generator.num_classes
    # Indices beyond those of the grids, so that the noise is not that of pictures one has looked at.
    samples = generator(ema, labels, 1_000_000 + np.arange(count))
    if jax.process_index():
        return
    if not np.isfinite(samples).all():
        raise UserError(f"the samples at the end of {workdir} are not finite: lower sample.cfg_scale, or train on")
    result = classifier.report((train.x, train.y), (held_out.x, held_out.y), samples, labels)
    result["train_seconds"] = round(train_seconds, 1)
    path = os.path.join(workdir, "report.json")
    write_aside(path, (json.dumps(result, indent=2) + "\n").encode())
    say(f"""
The judge, fitted on the {len(train)} real training pictures, recognises {result["judge_accuracy"]:.1%} of the \
{len(held_out)} held-out ones.
Of {count} samples it recognises {result["recognised"]:.1%} as the class asked for.
Fréchet distance to the held-out pictures, in the judge's features:
  samples        {result["frechet"]:8.3f}
  real training  {result["frechet_floor"]:8.3f}   (the floor)
  noise          {result["frechet_noise"]:8.3f}
Trained for {train_seconds:.0f} s. All this is in {path}""")
