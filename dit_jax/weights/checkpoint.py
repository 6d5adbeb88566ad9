"""Checkpoints of a run: the only file that knows orbax.

workdir/checkpoints/STEP/ holds the items params, ema, optimizer and meta (JSON: the resolved config, the data's
identity, seconds trained). They are written asynchronously, aside, and renamed when whole.
"""

import contextlib
import glob
import os
import shutil
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dit_jax import config as configs
from dit_jax.runtime import files, hosts
from dit_jax.runtime.errors import UserError, first_line
from dit_jax.runtime.process import quiet_orbax_readers
from dit_jax.runtime.progress import say

ITEMS = ("params", "ema", "optimizer")


def _reason(error):
    """What an exception of orbax's says: the first line of its root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@jax.jit
def _fingerprint(tree):
    """The sum of all words of all arrays modulo 2**32: whatever the mesh, and any flipped bit changes it."""
    return sum(jnp.sum(jax.lax.bitcast_convert_type(leaf, jnp.uint32)) for leaf in jax.tree.leaves(tree))


def _problem(meta):
    """What the meta item of a checkpoint lacks, or None."""
    if not isinstance(meta, dict):
        return "its meta is no mapping"
    fingerprints = meta.get("fingerprints")
    if not isinstance(fingerprints, dict) or not all(isinstance(fingerprints.get(name), int) for name in ITEMS):
        return f"its meta has fingerprints={fingerprints!r:.80}, no number for each of {', '.join(ITEMS)}"
    seconds = meta.get("train_seconds")
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e12:
        return f"its meta has train_seconds={seconds!r:.80}, no number of seconds"
    unlogged = meta.get("unlogged", [])  # those of older versions have none
    if not isinstance(unlogged, list) or not all(isinstance(v, dict) and all(isinstance(x, float) for x in v.values())
                                                 for v in unlogged):
        return f"its meta has unlogged={unlogged!r:.80}, no list of a step's values each"
    if not isinstance(meta.get("data"), str):
        return f"its meta has data={meta.get('data')!r}, no text"
    problem = configs.stored_problem(meta.get("config"))
    return problem and f"its meta has {problem}"


class Checkpoints:
    """keep: how many of the newest stay, 0 all; keep_every: those of such steps stay for good, 0 none.
    read_only: for readers beside a run that may be writing."""

    def __init__(self, workdir, keep=0, keep_every=0, read_only=False):
        self.directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, keep_period=keep_every or None, read_only=read_only, create=not read_only)
        if read_only and not os.path.isdir(self.directory):
            raise UserError(f"{workdir}: holds no checkpoints; train there first, or name another --workdir")
        if not read_only and set("[]") & set(self.directory):
            raise UserError(f"{workdir}: orbax takes [ and ] in a path for a pattern, and would lose checkpoints: name another "
                            "--workdir")
        for name in os.listdir(self.directory) if os.path.isdir(self.directory) else ():
            if name.isdigit() and not os.path.isdir(os.path.join(self.directory, name)):
                raise UserError(f"{self.directory}/{name}: stands in the place of a checkpoint: move it away")
        quiet_orbax_readers()
        if not read_only and jax.process_index() == 0:
            # What a killed run was writing. Orbax would clean up in a thread of its own, which outlives an error here.
            for path in glob.glob(f"{glob.escape(self.directory)}/*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path)
        hosts.share(None)  # when that is done
        self.manager = self.reader = ocp.CheckpointManager(self.directory, options=options)
        if jax.process_count() > 1:
            # Each host reads for itself. Orbax's own reader would wait for all, for good where one host cannot read.
            me = jax.process_index()
            self.reader = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
                read_only=True, multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}")))

    def steps(self):
        return sorted(self.manager.all_steps())

    def save(self, step, items, meta):
        """Saves {name of ITEMS: tree}. Returns when the arrays are copied; they are written in the background."""
        if step in self.steps():
            return
        self.wait()
        # Where nothing can be written, orbax's threads may wait for each other for minutes.
        if jax.process_index() == 0:
            files.probe(self.directory)
        with self._errors():
            meta = meta | {"fingerprints": {name: int(_fingerprint(item)) for name, item in items.items()}}
            self.manager.save(step, args=ocp.args.Composite(
                meta=ocp.args.JsonSave(meta),
                **{name: ocp.args.StandardSave(item) for name, item in items.items()}))

    @contextlib.contextmanager
    def _errors(self):
        """What orbax raises over a checkpoint that it cannot write becomes an OSError or a UserError."""
        try:
            with files.naming(self.directory):
                yield
        except (UserError, OSError):
            raise
        except Exception as e:
            raise UserError(f"{self.directory}: a checkpoint cannot be written ({_reason(e)})") from e

    def wait(self):
        with self._errors():
            self.manager.wait_until_finished()

    def check(self):
        """Raises OSError or UserError where the writing that goes on behind has failed."""
        with self._errors():
            self.manager.check_for_errors()

    def settle(self, seconds):
        """Waits for what is being written, so long at most -> the newest step that is whole, or 0. Of any thread."""
        deadline = time.monotonic() + seconds
        while self.manager.is_saving_in_progress() and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(OSError):
            return max((int(name) for name in os.listdir(self.directory) if name.isdigit()), default=0)
        return 0

    def meta(self, step):
        """The meta item, looked through. Raises UserError where this process may not read the checkpoint."""
        folder = os.path.join(self.directory, str(step))
        inside = (os.path.join(place, name) for place, folders, names in os.walk(folder) for name in folders + names)
        for path in (folder, *inside):  # no permission is no damage
            if os.path.exists(path) and not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
                raise UserError(f"{path}: cannot be read (Permission denied): change the permissions")
        meta = self.reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if isinstance(meta, dict) and "fingerprints" not in meta:
            raise UserError(f"{folder}/meta: has no fingerprints: an older version of dit_jax wrote this checkpoint. Take "
                            "its weights out with that version (dit_jax.convert), and start a new run from them with "
                            "--config.init.weights")
        if problem := _problem(meta):
            raise ValueError(problem)
        return meta

    def _restore(self, step, targets, check=lambda meta: None):
        """(items, meta, None), or, where any host cannot read them, (None, None, why)."""
        items = meta = why = None
        try:
            meta = self.meta(step)
            check(meta)
            items = self.reader.restore(step, args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(target) for name, target in targets.items()}))
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # not the checkpoint's fault
            raise
        except Exception as e:
            why = _reason(e)
        why = next((w for w in hosts.share(why) if w), None)
        for name in [] if why else targets:
            # Orbax notices a file that is cut short, but not a byte that has changed.
            if int(_fingerprint(items[name])) != meta["fingerprints"][name]:
                why = f"the bytes of {name} are not those that were written"
        return (None, None, why) if why else (items, meta, None)

    def restore_latest(self, targets, check):
        """(items, meta) of the newest checkpoint that can be read, or None where there is none at all.

        targets: {name of ITEMS: tree of ShapeDtypeStructs with shardings}. check(meta) raises UserError where the checkpoint
        is of another run. A damaged checkpoint is moved to workdir/damaged, and said.
        """
        steps = hosts.share(self.steps())[0]
        for step in reversed(steps):
            items, meta, why = self._restore(step, targets, check)
            if not why:
                return items, meta
            self._set_aside(step, why)
        if steps:
            raise UserError(f"{self.directory}: none of the checkpoints can be read (the last one tried: {why}); name another "
                            "--workdir, or move this one away to start over")
        return None

    def restore_params(self, step, which, target):
        """(step, the item "ema" or "params", meta) of `step` or, where it is None, of the newest that can be read."""
        steps = hosts.share(self.steps())[0]
        if step is not None and step not in steps:
            raise UserError(f"--step={step}: {self.directory} has {', '.join(map(str, steps)) or 'none'}")
        for s in [step] if step is not None else reversed(steps):
            items, meta, why = self._restore(s, {which: target})
            if not why:
                return s, items[which], meta
            say(f"checkpoint {self.directory}/{s} cannot be read ({why})")
        raise UserError(f"{self.directory}: no checkpoint can be read (the last one tried: {why})")

    def latest_meta(self, step=None):
        """The meta item of `step`, or of the newest checkpoint whose meta the first host can read."""
        return hosts.share(None if jax.process_index() else self._latest_meta(step))[0]

    def _latest_meta(self, step):
        for s in [step] if step is not None and step in self.steps() else reversed(self.steps()):
            try:
                return self.meta(s)
            except UserError:
                raise
            except Exception as e:
                why = _reason(e)
                say(f"checkpoint {self.directory}/{s} cannot be read ({why})")
        raise UserError(f"{self.directory}: no checkpoint can be read (the last one tried: {why})")

    def _set_aside(self, step, why):
        damaged = os.path.join(os.path.dirname(self.directory), "damaged")
        say(f"checkpoint {self.directory}/{step} cannot be read ({why}): moved to {damaged}, falling "
            "back to the one before")
        if jax.process_index() == 0:
            os.makedirs(damaged, exist_ok=True)
            target, n = os.path.join(damaged, str(step)), 1
            while os.path.exists(target):
                target, n = os.path.join(damaged, f"{step}-{n}"), n + 1
            os.rename(os.path.join(self.directory, str(step)), target)
        hosts.share(None)  # when that is done
        self.manager.reload()

    def close(self):
        self.wait()
        self.manager.close()
