"""What happens every N steps of a run: records, checkpoints' meta, grids, evaluation, the loss curve, the closing
measurement."""

import json
import math
import os
import time

import jax
import numpy as np

from dit_jax.evaluation import classifier
from dit_jax.runtime import hosts, images as pictures
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import Progress, duration, say
from dit_jax.training.metrics import Metrics, loss_curve
from dit_jax.training.setup import grid_labels


class Reports:
    """The reports of a run (training.setup.Run) in its folder, which resumes after step `first` with a checkpoint's meta.

    The values of steps stay on the devices until `read`. A record is the mean over the steps since the last one, also
    where the run was stopped in between: a checkpoint's meta keeps their values.
    """

    def __init__(self, run, workdir, checkpoints, first, meta):
        self.run, self.workdir, self.checkpoints, self.meta = run, workdir, checkpoints, meta
        self.steps = run.config["steps"]
        self.metrics = Metrics(workdir, first)
        self.progress = Progress("train", self.steps, "steps", done=first)
        self.pending, self.unlogged = [], meta.get("unlogged", [])
        self.start, self.trained_before = time.perf_counter(), meta["train_seconds"]
        self.restart_clock(first)

    def restart_clock(self, step, batches=None):
        """The rate of the next record counts from here."""
        self.mark, self.mark_step = time.perf_counter(), step
        if batches:
            batches.waited = 0.0

    def seconds(self):
        """Seconds that this run has trained, stops left out."""
        return self.trained_before + time.perf_counter() - self.start

    def read(self, step):
        """Reads the pending values, up to those of `step`. UserError where one is not finite: nothing is saved that was
        not seen to be finite."""
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
            saved = max(self.checkpoints.steps(), default=None)
            rate = self.run.config["optimizer"]["learning_rate"]
            raise UserError(
                f"step {step}: the loss is {v['loss']}, the gradient's norm {v['grad_norm']}, the parameters' "
                f"{v['param_norm']}; " + ("no checkpoint was written" if saved is None else
                                          f"the last good checkpoint is step {saved} in {self.checkpoints.directory}")
                + f". Lower optimizer.learning_rate ({rate}) or look at the data")

    def log(self, step, batches):
        """A record of the steps since the last one: in metrics.jsonl, and a line."""
        now = time.perf_counter()
        rate = (step - self.mark_step) / (now - self.mark)
        images = rate * self.run.config["batch_size"]
        record = {name: float(np.mean([v[name] for v in self.unlogged if name in v])) for name in self.unlogged[-1]}
        record |= {"steps_per_second": rate, "images_per_second": images, "data_wait": batches.waited / (now - self.mark),
                   "mfu": self.run.mfu(images)}
        self.metrics.write(step, record)
        self.unlogged = []
        self.restart_clock(step, batches)
        self.progress.update(step, f"loss {record['loss']:.4f}, {images:.0f} img/s, MFU {record['mfu']:.0%}")
        self.progress.say(
            f"step {step}/{self.steps}  loss {record['loss']:.4f}  mse {record['mse']:.4f}  vb {record['vb']:.4f}  "
            f"{rate:.3g} steps/s  {images:.4g} images/s  MFU {record['mfu']:.0%}  "
            f"{duration((self.steps - step) / rate)} left"
            + (f"  waited for data {record['data_wait']:.0%}" if record["data_wait"] > 0.05 else ""))

    def checkpoint_meta(self):
        """The meta of a checkpoint that is saved now."""
        return {"config": self.run.config, "data": self.run.source.identity, "init": self.meta.get("init"),
                "train_seconds": self.seconds(), "unlogged": self.unlogged, "versions": {"jax": jax.__version__}}

    def draw_grid(self, step, ema):
        """A picture of config.sample.per_class samples of each of the first classes, a row a class."""
        labels = grid_labels(self.run.config)
        images = self.run.generator(ema, labels, np.arange(len(labels)))
        images = self.run.decode(images) if self.run.decode else images
        if jax.process_index() == 0:
            write_aside(os.path.join(self.workdir, "samples", f"{step:08d}.png"), pictures.png(
                pictures.grid(pictures.to_uint8(images), self.run.config["sample"]["per_class"])))

    def evaluate_if_due(self, step, ema):
        """FID and the like, where config.eval asks for it at this step and no record has it -> whether it was measured.
        What a stop left out between a checkpoint and this, the resumed run makes up for."""
        every = self.run.config["eval"]["every"]
        if not every or not step or (step % every and step < self.steps):
            return False
        if hosts.share(any(r["step"] == step and "loss" not in r for r in self.metrics.records))[0]:
            return False
        values, line = self.run.evaluation(ema)
        if values:
            self.metrics.write(step, values)
        self.progress.say(f"step {step}/{self.steps}  {line}")
        return True

    def draw_curve(self):
        if self.metrics.main:
            loss_curve(self.metrics.records, os.path.join(self.workdir, "loss.png"))

    def close(self):
        self.progress.close()


def closing_measurement(run, ema, train_seconds, workdir):
    """Writes report.json: samples of every class in turn, seen by a classifier fitted on the real training pictures."""
    train, held_out, generator, count = run.source, run.held_out, run.generator, run.config["judge"]["samples"]
    labels = np.arange(count) % generator.num_classes
    # Indices beyond those of the grids: other noise than the pictures one has looked at.
    samples = generator(ema, labels, 1_000_000 + np.arange(count))
    if jax.process_index():
        return
    if not np.isfinite(samples).all():
        raise UserError(f"the samples at the end of {workdir} are not finite: lower sample.cfg_scale, or train on")
    result = classifier.report((train.x, train.y), (held_out.x, held_out.y), samples, labels)
    result["train_seconds"] = round(train_seconds, 1)
    write_aside(os.path.join(workdir, "report.json"), (json.dumps(result, indent=2) + "\n").encode())
    say(f"""
The judge, fitted on the {len(train)} real training pictures, recognises {result['judge_accuracy']:.1%} of the \
{len(held_out)} held-out ones.
Of {count} samples it recognises {result['recognised']:.1%} as the class asked for.
Fréchet distance to the held-out pictures, in the judge's features:
  samples        {result['frechet']:8.3f}
  real training  {result['frechet_floor']:8.3f}   (the floor)
  noise          {result['frechet_noise']:8.3f}
Trained for {train_seconds:.0f} s. All this is in {os.path.join(workdir, 'report.json')}""")
