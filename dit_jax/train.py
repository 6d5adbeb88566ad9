"""Trains a DiT: python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits [--config.a.b=c]

The same command resumes from the newest checkpoint, and ends with the same parameters to the bit.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_config()
    cli.define_path("workdir", None, "run directory; created, or resumed if it exists")
    flags.DEFINE_string("profile", None, "START:STOP: a trace of these steps, in WORKDIR/profile")
    flags.DEFINE_bool("debug_nans", False, "stop at the first operation that makes a NaN, with a traceback; slow")
    cli.define_hosts()
    cli.parse()  # above the imports that take time

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax

from dit_jax import config as configs
from dit_jax.runtime import ending, files, hosts, process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say
from dit_jax.training import setup
from dit_jax.training.metrics import Record
from dit_jax.training.reports import Reports, closing_measurement
from dit_jax.training.step import to_items
from dit_jax.training.trace import Trace
from dit_jax.weights.checkpoint import Checkpoints


def main() -> int | None:
    f = flags.FLAGS
    if f.workdir is None:
        raise UserError("--workdir is missing: name the run's folder")
    config = configs.resolve(f.config)
    process.one_step_at_a_time()
    cli.make_workdir(
        f.workdir,
        files_in=("metrics.jsonl", "loss.png", "report.json"),
        folders_in=("checkpoints", "damaged", "samples", "tensorboard", "profile", "averages"),
    )
    process.keep_compiled(os.path.join(f.workdir, "compiled"))
    with files.hold(f.workdir, "workdir"):
        # The stack is never closed: after an error a command ends its process at once (runtime/ending.py).
        closing = contextlib.ExitStack()
        return train(
            config, f.workdir, closing, preemption=hosts.Preemption(), debug_nans=f.debug_nans, profile=f.profile
        )


def train(
    config: dict[str, Any],
    workdir: str,
    closing: contextlib.ExitStack,
    *,
    data: setup.Data | None = None,
    preemption: hosts.Preemption | None = None,
    debug_nans: bool = False,
    profile: str | None = None,
    on_log: Callable[[list[Record]], object] | None = None,
) -> int | None:
    """Trains a run, or resumes it from its newest checkpoint. Returns the exit status; None is success.

    Args:
      config: of config.resolve.
      workdir: the run directory, which exists and is held (runtime.files.hold).
      closing: takes what is to be closed; closed here at the end of the run.
      data: images and labels of the source `arrays`, in place of data.path.
      preemption: stops the run after a step when SIGTERM comes.
      debug_nans: whether to stop at the first operation that makes a NaN.
      profile: "START:STOP", the steps to trace.
      on_log: called after each record with all records so far.
    Raises: UserError, OSError.
    """
    if debug_nans and jax.process_count() > 1:
        raise UserError("--debug_nans: runs the failed step again operation by operation, which needs a single host")
    run = setup.build(config, data)
    say(run.describe())
    checkpoints = Checkpoints(workdir, config["checkpoint"]["keep"], config["checkpoint"]["keep_every"])
    closing.callback(checkpoints.close)
    state, meta = setup.restore_or_init(run, checkpoints)
    first, steps = int(state.step), config["steps"]
    trace = Trace(profile, os.path.join(workdir, "profile"), first + 1, steps)
    closing.callback(trace.close)
    reports = Reports(run, workdir, checkpoints, first, meta, on_log)
    closing.callback(reports.close)
    if preemption:
        preemption.begin(lambda: f"run the same command to resume from step {checkpoints.wait_for_newest(seconds=5)}")
    batches = run.batches(first)
    closing.callback(batches.close)
    if reports.evaluate_if_due(first, state.ema):
        reports.draw_curve()
        reports.restart_clock(first)

    stop = False
    for step in range(first + 1, steps + 1):
        batch = batches.get(running=reports.pending[-1:])
        with trace.step(step), jax.debug_nans(debug_nans):
            state, values = run.step(state, run.model_input(batch, step - 1))
        trace.after(step, values)
        reports.pending.append(values)
        reports.progress.update(step)

        stop, last = bool(preemption and preemption.reached(step)), step == steps
        log = last or step % config["log_every"] == 0
        save = last or stop or step % config["checkpoint"]["every"] == 0
        snapshot = config["average"]["every"] and (last or step % config["average"]["every"] == 0)
        draw = config["sample"]["every"] and (last or step % config["sample"]["every"] == 0)
        if log or save or snapshot:
            reports.read_values(step)
        if log:
            reports.log(step, batches)
        if snapshot:
            reports.write_snapshot(step, state.averages)
        if save:
            checkpoints.save(step, to_items(state), reports.checkpoint_meta())
        if draw:
            reports.draw_grid(step, state.ema)
        evaluated = not stop and reports.evaluate_if_due(step, state.ema)
        if save or draw or evaluated or snapshot:
            reports.draw_curve()
            reports.restart_clock(step, batches)
        if stop:
            break

    closing.close()
    if preemption:
        preemption.end()
    if stop:
        say(f"preempted: step {step} of {steps} is saved in {workdir}; run the same command to resume from there")
        return ending.AGAIN
    train_seconds = reports.seconds() if first < steps else meta["train_seconds"]
    say(f"done: step {steps}. All of the run is in {workdir}")
    if config["judge"]["samples"]:
        closing_measurement(run, state.ema, train_seconds, workdir)


if __name__ == "__main__":
    cli.run(main)
