"""The averages of a run's weights on disk, in WORKDIR/averages: snapshots that training writes, averages made of them.

snapshots/STEP.npz holds the averages that training tracks (config.average), and std0.1/STEP.npz one that
dit_jax.average has made. A file is whole or absent. Its arrays are float32 and named by their path in the parameters,
in a snapshot behind the average's name: "std0.05/blocks/attn/qkv/kernel". Its member `meta` is JSON: the step, the
sha256 of the arrays, and what a checkpoint knows of its run.

EDM2 stores float16. Float32 takes twice the disk, and a tracked average comes back to the bit: no value is too large or
too small for it, and a sum of snapshots does not multiply their rounding.
"""

import functools
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped

from dit_jax import config as configs
from dit_jax.parallel import sharding
from dit_jax.runtime import hosts
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import naming, reading, writing
from dit_jax.runtime.progress import say
from dit_jax.weights.archive import read_npz
from dit_jax.weights.files import Weights

SNAPSHOTS = "snapshots"  # a `kind` of file; the others are the names of averages, as "std0.1"
META = "meta"


def path_of(workdir: str, kind: str, step: int) -> str:
    """The file of a step. kind: SNAPSHOTS, or the name of an average."""
    return os.path.join(workdir, "averages", kind, f"{step:08d}.npz")


def steps_of(workdir: str, kind: str) -> list[int]:
    """The steps of all files of this kind, in order. Raises OSError."""
    folder = os.path.join(workdir, "averages", kind)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(name[:-4]) for name in names if re.fullmatch(r"[0-9]{8,}\.npz", name))


def remove_later(workdir: str, step: int) -> None:
    """Removes all files of steps after `step`, and says so: the run takes these steps again. For the first host."""
    folder, removed = os.path.join(workdir, "averages"), 0
    for kind in os.listdir(folder) if os.path.isdir(folder) else ():
        for later in steps_of(workdir, kind):
            if later > step:
                with naming(path := path_of(workdir, kind, later)):
                    os.remove(path)
                removed += 1
    if removed:
        say(f"{folder}: {removed} file(s) of steps after {step} removed: the run takes these steps again")


def write(path: str, arrays: Iterable[tuple[str, Float[np.ndarray, "..."]]], meta: dict[str, Any]) -> None:
    """Writes a file of named float32 arrays, taken one at a time. Raises OSError or UserError."""
    sha256 = hashlib.sha256()
    with writing(path) as f, zipfile.ZipFile(f, "w") as archive:
        for name, array in arrays:
            array = np.ascontiguousarray(array)
            sha256.update(array.data)
            _add(archive, name, array)
        text = json.dumps(meta | {"sha256": sha256.hexdigest()})
        _add(archive, META, np.frombuffer(text.encode(), np.uint8))


def _add(archive, name, array):
    # A ZipInfo of its own has a fixed date: the same arrays make the same file.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as f:
        np.lib.format.write_array(f, array)


def gathered(tree: Any) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """Yields (path, array) of each leaf of a tree of arrays on the devices. Every host must take all of them."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        whole = leaf if leaf.is_fully_addressable else _replicate(leaf.sharding.mesh)(leaf)
        yield sharding.path_name(path), np.asarray(whole)


@functools.cache
def _replicate(mesh):
    return jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))


def write_snapshot(workdir: str, step: int, averages: Any, meta: dict[str, Any]) -> None:
    """Writes the snapshot of a step: {name: tree of arrays}. Every host calls it; the first one writes."""
    arrays = gathered(averages)
    if jax.process_index() == 0:
        write(path_of(workdir, SNAPSHOTS, step), arrays, meta | {"step": step})
    else:
        for _ in arrays:
            pass


def open_file(path: str) -> tuple[dict[str, Any], Weights]:
    """Returns (meta, the arrays of a file; each is read when it is asked for). Raises UserError naming the file."""
    with reading(path, "averages"):
        arrays = read_npz(path)
        meta = json.loads(arrays.pop(META).read().tobytes())
        weights = Weights(path, arrays)
    if problem := _meta_problem(meta):
        raise UserError(f"{path}: its meta has {problem}")
    return meta, weights


def open_average(workdir: str, which: str, step: int | None = None) -> tuple[dict[str, Any], Weights]:
    """Returns open_file of an average that was made, by default of the last step.

    which: its name, as in "std0.1". Raises UserError, with the command that makes the average if there is none.
    """
    if not configs.is_which(which):
        raise UserError(f"which={which!r}: must be {configs.WHICH}")
    std = configs.average_std(which)
    name = configs.average_name(std)
    steps = hosts.share(steps_of(workdir, name))[0]
    if not steps or step is not None and step not in steps:
        at, flag = (f" of step {step}", f" --step={step}") if step is not None else ("", "")
        raise UserError(
            f"{workdir}: has no average {name}{at} (made so far: {', '.join(map(str, steps)) or 'none'}); this makes "
            f"it: python -m dit_jax.average --workdir={workdir} --std={std}{flag}"
        )
    path = path_of(workdir, name, steps[-1] if step is None else step)
    meta, weights = open_file(path)
    made = meta.get("average")
    if not isinstance(made, dict) or not isinstance(made.get("steps"), list):
        raise UserError(f"{path}: its meta does not say how the average was made: make it again")
    return meta, weights


def _meta_problem(meta: Any) -> str | None:
    """What is wrong with the meta of a file, or None."""
    if not isinstance(meta, dict):
        return "no mapping"
    if type(meta.get("step")) is not int or meta["step"] < 1:
        return f"step={meta.get('step')!r:.80}, no step"
    for name in ("data", "sha256"):
        if not isinstance(meta.get(name), str):
            return f"{name}={meta.get(name)!r:.80}, not a string"
    names = meta.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return f"class_names={names!r:.80}, not a list of names"
    return configs.stored_problem(meta.get("config"))


def to_params(weights: Weights, target: Any) -> Any:
    """The parameters in the file of an average. Raises UserError naming the file.

    target: a tree of ShapeDtypeStructs with shardings.
    """

    def read(path, leaf):
        name = sharding.path_name(path)
        if name not in weights:
            raise UserError(f"{weights.path}: {name} is missing")
        array = weights[name]
        if array.shape != leaf.shape:
            raise UserError(f"{weights.path}: {name} has the shape {array.shape}, and the network's {leaf.shape}")
        return sharding.put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(read, target)
