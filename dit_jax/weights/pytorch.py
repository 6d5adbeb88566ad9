"""Arrays between PyTorch's names and layouts, and a tree of Flax parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from dit_jax.runtime.errors import UserError

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}  # Flax -> PyTorch
TO_FLAX = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # axes by number of dimensions
TO_PYTORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def name_of(path: Sequence[Any], prefix: str = "") -> str:
    """The PyTorch name of the Flax parameter at `path` (keys of jax.tree_util).

    prefix: added to every part of the name that is not a number.
    """
    *parents, leaf = [str(key.key) for key in path]
    return ".".join([part if part.isdigit() else prefix + part for part in parents] + [LEAVES.get(leaf, leaf)])


def to_flax(file: str, flat: Mapping[str, np.ndarray], target: Any, prefix: str = "") -> Any:
    """Converts {PyTorch name: array} to a tree of float32 arrays with the shapes of the tree `target`.

    prefix: of name_of. Raises UserError naming `file` and an array that is missing, unknown, of another shape or not
    finite.
    """

    def convert(path, leaf):
        return np.ascontiguousarray(flat[name_of(path, prefix)].transpose(TO_FLAX[len(leaf.shape)]), np.float32)

    shapes = {
        name_of(path, prefix): tuple(leaf.shape[axis] for axis in TO_PYTORCH[len(leaf.shape)])
        for path, leaf in jax.tree_util.tree_leaves_with_path(target)
    }
    problems = [f"{name} is missing" for name in shapes if name not in flat]
    problems = problems or [f"unknown array {name}" for name in flat if name not in shapes]
    problems = problems or [
        f"{name} has shape {flat[name].shape}, the model needs {shape}"
        for name, shape in shapes.items()
        if flat[name].shape != shape
    ]
    problems = problems or [
        f"{name} holds numbers that are not finite"
        for name, a in flat.items()
        if a.dtype.kind != "f" or not np.isfinite(a).all()
    ]
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if problems[1:] else ""
        raise UserError(f"{file}: {problems[0]}{more}: take the published file")
    return jax.tree_util.tree_map_with_path(convert, target)


def from_flax(params: Any) -> dict[str, Float[np.ndarray, "..."]]:
    """Converts a tree of Flax parameters to {PyTorch name: float32 array}."""
    return {
        name_of(path): np.ascontiguousarray(np.asarray(a, np.float32).transpose(TO_PYTORCH[a.ndim]))
        for path, a in jax.tree_util.tree_leaves_with_path(params)
    }
