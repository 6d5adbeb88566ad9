"""Trains a DiT: python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits [--config.a.b=c]

The same command again goes on where the newest checkpoint stands, and ends with the same parameters to the bit.
"""

from dit_jax import cli

from absl import flags

if __name__ == "__main__":
    cli.define_config()
    cli.define_path("workdir", None, "run directory; created, or resumed if it exists")
    flags.DEFINE_string("profile", None, "START:STOP: a trace of these steps, in WORKDIR/profile")
    flags.DEFINE_bool("debug_nans", False, "stop at the first operation that makes a NaN, with a traceback; slow")
    cli.define_hosts()
    cli.parse()  # above the imports that take time

import os

import jax

from dit_jax import config as configs
from dit_jax.runtime import ending, files, hosts, process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say
from dit_jax.training import setup
from dit_jax.training.reports import Reports, closing_measurement
from dit_jax.training.step import to_items
from dit_jax.training.trace import Trace
from dit_jax.weights.checkpoint import Checkpoints


def main():
    f = flags.FLAGS
    if f.workdir is None:
        raise UserError("--workdir is missing: name the run's folder")
    config = configs.resolve(f.config)
    process.one_step_at_a_time()
    cli.make_workdir(f.workdir, files_in=("metrics.jsonl", "loss.png", "report.json"),
                     folders_in=("checkpoints", "damaged", "samples", "tensorboard", "profile"))
    process.keep_compiled(os.path.join(f.workdir, "compiled"))
    with files.hold(f.workdir, "workdir"):
        return train(config, f.workdir, hosts.Preemption(), debug_nans=f.debug_nans, profile=f.profile)


def train(config, workdir, preemption, *, debug_nans=False, profile=None):
    """Trains the run of a resolved config in a folder that is held; resumes it from its newest checkpoint -> exit status.

    preemption: hosts.Preemption. profile: "START:STOP" or None. Raises UserError.
    """
    if debug_nans and jax.process_count() > 1:
        raise UserError("--debug_nans: the step that failed is run again, operation by operation, which one host alone "
                        "can")
    run = setup.build(config)
    say(run.describe())
    checkpoints = Checkpoints(workdir, config["checkpoint"]["keep"], config["checkpoint"]["keep_every"])
    state, meta = setup.restore_or_init(run, checkpoints)
    first, steps = int(state.step), config["steps"]
    trace = Trace(profile, os.path.join(workdir, "profile"), first + 1, steps)
    reports = Reports(run, workdir, checkpoints, first, meta)
    preemption.begin(lambda: f"the same command goes on from step {checkpoints.settle(seconds=5)}")
    batches = run.batches(first)
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

        stop, last = preemption.reached(step), step == steps
        log = last or step % config["log_every"] == 0
        save = last or stop or step % config["checkpoint"]["every"] == 0
        draw = config["sample"]["every"] and (last or step % config["sample"]["every"] == 0)
        if log or save:
            reports.read(step)
        if log:
            reports.log(step, batches)
        if save:
            checkpoints.save(step, to_items(state), reports.checkpoint_meta())
        if draw:
            reports.draw_grid(step, state.ema)
        evaluated = not stop and reports.evaluate_if_due(step, state.ema)
        if save or draw or evaluated:
            reports.draw_curve()
            reports.restart_clock(step, batches)
        if stop:
            break

    reports.close()
    trace.close()
    batches.close()
    checkpoints.close()
    preemption.end()
    if stop:
        say(f"preempted: step {step} of {steps} is saved in {workdir}, and the same command goes on from there")
        return ending.AGAIN
    train_seconds = reports.seconds() if first < steps else meta["train_seconds"]
    say(f"done: step {steps}. All of the run is in {workdir}")
    if config["judge"]["samples"]:
        closing_measurement(run, state.ema, train_seconds, workdir)


if __name__ == "__main__":
    cli.run(main)
