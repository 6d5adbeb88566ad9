"""Checkpoints of a run: the only file that knows orbax.

workdir/checkpoints/STEP/ holds the items params, ema, optimizer and meta (JSON: the resolved config, the data's
identity, seconds trained). They are written asynchronously, aside, and renamed when whole.
"""

import os

import jax
import orbax.checkpoint as ocp

from dit_jax.config import UserError
from dit_jax.logging import say
from dit_jax.state import TrainState


def _first_line(error):
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


class Checkpoints:
    """keep: how many of the newest stay, 0 all; keep_every: those of such steps stay for good, 0 none.
    read_only: for readers beside a run that may be writing."""

    def __init__(self, workdir, keep=0, keep_every=0, read_only=False):
        self.directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
        self.options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, keep_period=keep_every or None, read_only=read_only, create=not read_only,
            cleanup_tmp_directories=not read_only)
        if read_only and not os.path.isdir(self.directory):
            raise UserError(f"{workdir}: holds no checkpoints; train there first, or name another --workdir")
        self._open()

    def _open(self):
        self.manager = ocp.CheckpointManager(self.directory, options=self.options)

    def steps(self):
        return sorted(self.manager.all_steps())

    def save(self, step, state, meta):
        """Returns when the state is copied; the writing goes on behind."""
        if step in self.steps():
            return
        try:
            self.manager.save(step, args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params), ema=ocp.args.StandardSave(state.ema),
                optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                meta=ocp.args.JsonSave(meta)))
        except Exception as e:
            raise UserError(f"{self.directory}/{step}: the checkpoint cannot be written ({_first_line(e)})") from e

    def wait(self):
        try:
            self.manager.wait_until_finished()
        except Exception as e:
            raise UserError(f"{self.directory}: the last checkpoint could not be written ({_first_line(e)})") from e

    def meta(self, step):
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore_latest(self, target, check):
        """(state, meta) of the newest checkpoint that can be read, or None where there is none at all.

        target: a TrainState of ShapeDtypeStructs with shardings. check(meta) raises UserError where the checkpoint
        is of another run. A damaged checkpoint is moved to workdir/damaged, and said.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                meta = self.meta(step)
                check(meta)
                items = self.manager.restore(step, args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(target.params), ema=ocp.args.StandardRestore(target.ema),
                    optimizer=ocp.args.StandardRestore({"step": target.step, "opt_state": target.opt_state})))
                optimizer = items["optimizer"]
                return TrainState(optimizer["step"], items["params"], items["ema"], optimizer["opt_state"]), meta
            except UserError:
                raise
            except Exception as e:
                self._set_aside(step, e)
        if steps:
            raise UserError(f"{self.directory}: none of the checkpoints can be read; name another --workdir, or move "
                            "this one away to start over")
        return None

    def restore_params(self, step, which, target):
        """The item "ema" or "params" alone, of `step` or, where it is None, of the newest that can be read."""
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"--step={step}: {self.directory} has {', '.join(map(str, steps)) or 'none'}")
        for s in [step] if step is not None else reversed(steps):
            try:
                return s, self.manager.restore(s, args=ocp.args.Composite(
                    **{which: ocp.args.StandardRestore(target)}))[which]
            except Exception as e:
                say(f"checkpoint {self.directory}/{s} cannot be read ({_first_line(e)})")
        raise UserError(f"{self.directory}: no checkpoint can be read")

    def latest_meta(self, step=None):
        """The meta item of `step`, or of the newest checkpoint whose meta can be read."""
        for s in [step] if step is not None and step in self.steps() else reversed(self.steps()):
            try:
                return self.meta(s)
            except Exception as e:
                say(f"checkpoint {self.directory}/{s} cannot be read ({_first_line(e)})")
        raise UserError(f"{self.directory}: no checkpoint can be read")

    def _set_aside(self, step, error):
        damaged = os.path.join(os.path.dirname(self.directory), "damaged")
        say(f"checkpoint {self.directory}/{step} cannot be read ({_first_line(error)}): moved to {damaged}, falling "
            "back to the one before")
        self.manager.close()
        if jax.process_index() == 0:
            os.makedirs(damaged, exist_ok=True)
            target, n = os.path.join(damaged, str(step)), 1
            while os.path.exists(target):
                target, n = os.path.join(damaged, f"{step}-{n}"), n + 1
            os.rename(os.path.join(self.directory, str(step)), target)
        if jax.process_count() > 1:
            jax.experimental.multihost_utils.sync_global_devices("set aside a damaged checkpoint")
        self._open()

    def close(self):
        self.wait()
        self.manager.close()
