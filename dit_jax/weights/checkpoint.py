"""Checkpoints of a run: the only file that knows orbax.

workdir/checkpoints/STEP/ holds the items params, ema, optimizer and meta (JSON: the resolved config, the data's
identity, seconds trained). A checkpoint is written in the background, into a temporary folder that is renamed when it
is complete.
"""

import contextlib
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dit_jax import config as configs
from dit_jax.runtime import files, hosts
from dit_jax.runtime.errors import UserError, first_line
from dit_jax.runtime.process import quiet_absl, quiet_orbax_readers
from dit_jax.runtime.progress import say

ITEMS = ("params", "ema", "optimizer")


class _Damaged(Exception):
    """A checkpoint cannot be read. The text is the reason, the same on every host."""


def _reason(error: BaseException) -> str:
    """The first line of the root cause of an exception that orbax raised."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@jax.jit
def _fingerprint(tree):
    """The sum of all words of all arrays modulo 2**32. It is the same on any mesh, and any flipped bit changes it."""
    return sum(jnp.sum(jax.lax.bitcast_convert_type(leaf, jnp.uint32)) for leaf in jax.tree.leaves(tree))


def _meta_problem(meta: Any) -> str | None:
    """What is wrong with the meta item of a checkpoint, or None."""
    if not isinstance(meta, dict):
        return "its meta is not a mapping"
    fingerprints = meta.get("fingerprints")
    if not isinstance(fingerprints, dict) or not all(isinstance(fingerprints.get(name), int) for name in ITEMS):
        return f"its meta has fingerprints={fingerprints!r:.80}, not a number for each of {', '.join(ITEMS)}"
    seconds = meta.get("train_seconds")
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e12:
        return f"its meta has train_seconds={seconds!r:.80}, not a number of seconds"
    unlogged = meta.get("unlogged", [])  # missing in checkpoints of older versions
    if not isinstance(unlogged, list) or not all(
        isinstance(v, dict) and all(isinstance(x, float) for x in v.values()) for v in unlogged
    ):
        return f"its meta has unlogged={unlogged!r:.80}, not a list with the values of each step"
    if not isinstance(meta.get("data"), str):
        return f"its meta has data={meta.get('data')!r}, not a string"
    names = meta.get("class_names")  # missing in checkpoints of older versions
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return f"its meta has class_names={names!r:.80}, not a list of names"
    problem = configs.stored_problem(meta.get("config"))
    return problem and f"its meta has {problem}"


class Checkpoints:
    """Saves and restores the checkpoints of a run.

    Args:
      keep: how many of the newest checkpoints are kept; 0 keeps all.
      keep_every: checkpoints of steps that this divides are kept for good; 0 for none.
      read_only: writes and deletes nothing, for readers of a run that may still be writing.
    Raises: UserError if `workdir` cannot hold checkpoints, or has no folder of them to read.
    """

    def __init__(self, workdir: str, keep: int = 0, keep_every: int = 0, read_only: bool = False):
        self.directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
        if read_only and not os.path.isdir(self.directory):
            raise UserError(f"{workdir}: holds no checkpoints: name the directory of a run that has saved one")
        if not read_only and set("[]") & set(self.directory):
            raise UserError(
                f"{workdir}: orbax reads [ and ] in a path as a pattern, and would lose checkpoints: name another "
                "--workdir"
            )
        for name in os.listdir(self.directory) if os.path.isdir(self.directory) else ():
            if name.isdigit() and not os.path.isdir(os.path.join(self.directory, name)):
                raise UserError(f"{self.directory}/{name}: is a file where a checkpoint's folder goes: move it away")
        if not read_only and jax.process_index() == 0:
            # Left by a killed run. Orbax would delete them in a thread of its own, which outlives an error here.
            for path in glob.glob(f"{glob.escape(self.directory)}/*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path)
        hosts.share(None)  # waits for the first host
        with quiet_absl():
            self.manager, self.reader = self._open(keep, keep_every, read_only)

    def _open(self, keep, keep_every, read_only):
        """Returns orbax's manager, and one that reads for this host alone: the same if there is one host."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, keep_period=keep_every or None, read_only=read_only, create=not read_only
        )
        manager = ocp.CheckpointManager(self.directory, options=options)
        if jax.process_count() == 1:
            return manager, manager
        # Orbax's own reader would wait forever if one host cannot read.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}"
        )
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
        return manager, ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, in order."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
        """Saves {name of ITEMS: tree} and the meta item; does nothing if `step` is already saved.

        Returns when the arrays are copied; they are written in the background. Raises OSError or UserError.
        """
        if step in self.steps():
            return
        self.wait()
        # If the folder cannot be written, orbax's threads may wait for each other for minutes.
        if jax.process_index() == 0:
            files.probe(self.directory)
        with self._orbax_errors():
            meta = meta | {"fingerprints": {name: int(_fingerprint(item)) for name, item in items.items()}}
            arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            self.manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays))

    @contextlib.contextmanager
    def _orbax_errors(self) -> Iterator[None]:
        """Turns what orbax raises when it cannot write a checkpoint into an OSError or a UserError."""
        try:
            with files.naming(self.directory):
                yield
        except (UserError, OSError):
            raise
        except Exception as e:
            raise UserError(f"{self.directory}: a checkpoint cannot be written ({_reason(e)})") from e

    def wait(self) -> None:
        """Waits until what was saved is written. Raises OSError or UserError if that failed."""
        with self._orbax_errors():
            self.manager.wait_until_finished()

    def check(self) -> None:
        """Raises OSError or UserError if writing in the background has failed."""
        with self._orbax_errors():
            self.manager.check_for_errors()

    def wait_for_newest(self, seconds: float) -> int:
        """Waits at most so long for a checkpoint that is being written. Returns the newest complete step, or 0.

        May be called from any thread.
        """
        deadline = time.monotonic() + seconds
        while self.manager.is_saving_in_progress() and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(OSError):
            return max((int(name) for name in os.listdir(self.directory) if name.isdigit()), default=0)
        return 0

    def meta(self, step: int) -> dict[str, Any]:
        """The checked meta item of a checkpoint.

        Raises UserError if this process may not read the checkpoint, or if an older version wrote it; any other
        exception if it is damaged.
        """
        folder = os.path.join(self.directory, str(step))
        inside = (os.path.join(parent, name) for parent, folders, names in os.walk(folder) for name in folders + names)
        for path in (folder, *inside):  # a file without permission is not a damaged one
            if os.path.exists(path) and not os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0)):
                raise UserError(f"{path}: cannot be read (Permission denied): change the permissions")
        meta = self.reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if isinstance(meta, dict) and "fingerprints" not in meta:
            raise UserError(
                f"{folder}/meta: has no fingerprints: an older version of dit_jax wrote this checkpoint. Convert its "
                "weights with that version (dit_jax.convert), and start a new run from them with --config.init.weights"
            )
        if problem := _meta_problem(meta):
            raise ValueError(problem)
        return meta

    def _restore(
        self, step: int, targets: dict[str, Any], check: Callable[[dict[str, Any]], None] = lambda meta: None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (items, meta). Raises _Damaged on every host if any host cannot read them."""
        items: Any = {}
        meta: dict[str, Any] = {}
        why = None
        with quiet_orbax_readers():
            try:
                meta = self.meta(step)
                check(meta)
                arrays = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
                items = self.reader.restore(step, args=ocp.args.Composite(**arrays))
            except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # the checkpoint is not at fault
                raise
            except Exception as e:
                why = _reason(e)
            if why:
                time.sleep(0.5)  # the other readers are cancelled now, and report it from their threads
        why = next((w for w in hosts.share(why) if w), None)
        if why:
            raise _Damaged(why)
        # Orbax notices a file that is cut short, but not a byte that has changed.
        changed = [name for name in targets if int(_fingerprint(items[name])) != meta["fingerprints"].get(name)]
        if changed:
            raise _Damaged(f"the bytes of {', '.join(changed)} are not those that were written")
        return items, meta

    def restore_latest(
        self, targets: dict[str, Any], check: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Returns (items, meta) of the newest checkpoint that can be read, or None if there are no checkpoints.

        A damaged checkpoint is moved to workdir/damaged, with a line that says so.

        Args:
          targets: {name of ITEMS: tree of ShapeDtypeStructs with shardings}.
          check: check(meta) raises UserError if the checkpoint is of another run.
        Raises: UserError if all checkpoints are damaged.
        """
        steps, why = hosts.share(self.steps())[0], None
        for step in reversed(steps):
            try:
                return self._restore(step, targets, check)
            except _Damaged as e:
                why = str(e)
                self._set_aside(step, why)
        if why:
            raise UserError(
                f"{self.directory}: none of the checkpoints can be read (the last one tried: {why}); name another "
                "--workdir, or move this one away to start over"
            )
        return None

    def restore_params(self, step: int | None, which: str, target: Any) -> tuple[int, Any, dict[str, Any]]:
        """Returns (step, parameters, meta) of a checkpoint; of the newest that can be read if `step` is None.

        which: the item, "ema" or "params". target: a tree of ShapeDtypeStructs with shardings. Raises UserError.
        """
        steps, why = hosts.share(self.steps())[0], None
        if step is not None and step not in steps:
            raise UserError(f"--step={step}: {self.directory} has {', '.join(map(str, steps)) or 'none'}")
        for s in [step] if step is not None else reversed(steps):
            try:
                items, meta = self._restore(s, {which: target})
                return s, items[which], meta
            except _Damaged as e:
                why = str(e)
                say(f"checkpoint {self.directory}/{s} cannot be read ({why})")
        raise self._none_readable(why)

    def latest_meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta item of `step`, or of the newest checkpoint with a meta that can be read. Raises UserError.

        Only the first host reads; all return the same.
        """
        meta: Any = None if jax.process_index() else self._latest_meta(step)
        return hosts.share(meta)[0]

    def _latest_meta(self, step):
        why = None
        with quiet_orbax_readers():
            for s in [step] if step is not None and step in self.steps() else reversed(self.steps()):
                try:
                    return self.meta(s)
                except UserError:
                    raise
                except Exception as e:
                    why = _reason(e)
                    say(f"checkpoint {self.directory}/{s} cannot be read ({why})")
        raise self._none_readable(why)

    def _none_readable(self, why: str | None) -> UserError:
        """The error of a reader. why: the reason of the last checkpoint tried; None if there are no checkpoints."""
        if why is None:
            return UserError(f"{self.directory}: holds no checkpoint yet; wait for one, or name another run")
        return UserError(f"{self.directory}: no checkpoint can be read (the last one tried: {why})")

    def _set_aside(self, step: int, why: str) -> None:
        """Moves a damaged checkpoint to workdir/damaged."""
        damaged = os.path.join(os.path.dirname(self.directory), "damaged")
        say(
            f"checkpoint {self.directory}/{step} cannot be read ({why}): moved to {damaged}, falling "
            "back to the one before"
        )
        if jax.process_index() == 0:
            os.makedirs(damaged, exist_ok=True)
            target, n = os.path.join(damaged, str(step)), 1
            while os.path.exists(target):
                target, n = os.path.join(damaged, f"{step}-{n}"), n + 1
            os.rename(os.path.join(self.directory, str(step)), target)
        hosts.share(None)  # waits for the first host
        self.manager.reload()

    def close(self) -> None:
        """Waits until all is written, and closes orbax's manager. Raises OSError or UserError."""
        self.wait()
        self.manager.close()
