"""Averages of the weights whose width is chosen after training: EDM2, arXiv 2312.02696, section 3 and appendix C.

A power-function average at time T weights the parameters of time t <= T by (gamma + 1) t^gamma / T^(gamma + 1),
equation 121. Its width is the relative standard deviation `std` of this profile: the standard deviation divided by T.
Training tracks two of them and keeps snapshots of both (weights.snapshots). The profile of any other width is fitted by
a sum of the profiles of the snapshots, and the average is the same sum of the snapshots.

Times are numbers of updates. The paper counts images; the unit does not matter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from dit_jax import config as configs
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import Progress
from dit_jax.weights import snapshots


def exponent(std: ArrayLike) -> Float[np.ndarray, "*shape"]:
    """The exponent gamma of the profile of relative standard deviation `std`: equation 126, algorithm 2."""
    inverse = np.asarray(std, np.float64) ** -2
    largest = [np.roots(np.array([1, 7, 16 - i, 12 - i])).real.max() for i in inverse.flat]
    return np.reshape(largest, inverse.shape)


def std_of(exponent: ArrayLike) -> Float[np.ndarray, "*shape"]:
    """The relative standard deviation of the profile of exponent gamma: equation 123."""
    gamma = np.asarray(exponent, np.float64)
    return np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def beta(std: ArrayLike, updates: ArrayLike) -> Float[np.ndarray, "*shape"]:
    """The decay at update number `updates`, counted from 1: equation 127.

    At the first it is 0, so that the initial weights have no part in the average.
    """
    return (1 - 1 / np.asarray(updates, np.float64)) ** (exponent(std) + 1)


def track(name: str, average: Any, params: Any, updates: Int[Array, ""]) -> Any:
    """The average of this name after update number `updates`, which gave `params`. Both are trees of arrays."""
    gamma = float(exponent(configs.average_std(name)))
    # 1 - beta without the subtraction, which would leave two digits of it after a million steps in float32.
    rate = -jnp.expm1((gamma + 1) * jnp.log1p(-1 / jnp.asarray(updates, float)))
    return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)


def inner_product(
    time_a: ArrayLike, std_a: ArrayLike, time_b: ArrayLike, std_b: ArrayLike
) -> Float[np.ndarray, "*shape"]:
    """The integral of the product of two profiles: equation 151. The arguments broadcast."""
    a, b = (exponent(std) for std in (std_a, std_b))
    earlier, later = np.minimum(time_a, time_b), np.maximum(time_a, time_b)
    ratio = (earlier / later) ** np.where(np.less(time_a, time_b), b, a)
    return (a + 1) * (b + 1) / (a + b + 1) * ratio / later


def coefficients(
    times: ArrayLike, stds: ArrayLike, time: float, std: float
) -> tuple[Float[np.ndarray, " snapshots"], float]:
    """The coefficients with which snapshots sum to the average of width `std` at `time`: algorithm 3.

    times, stds: of each snapshot. The coefficients sum to 1. Returns (coefficients, the distance of the fitted profile
    from the wanted one as a share of the wanted one's norm).
    """
    times, stds = np.asarray(times, np.float64), np.asarray(stds, np.float64)
    products = inner_product(times[:, None], stds[:, None], times, stds)
    wanted = inner_product(times, stds, time, std)
    fit = np.linalg.solve(products, wanted)
    fit = fit / fit.sum()
    norm = inner_product(time, std, time, std)
    return fit, float(np.sqrt(max(0.0, (fit @ products @ fit - 2 * fit @ wanted + norm) / norm)))


def snapshot_steps(workdir: str, step: int | None = None) -> list[int]:
    """The steps of the snapshots of a run, up to `step`, which is one of them. Raises UserError naming the flag."""
    steps = snapshots.steps_of(workdir, snapshots.SNAPSHOTS)
    if not steps:
        raise UserError(
            f"{workdir}: holds no snapshots of averages: a run writes them that is started with "
            "--config.average.every=N"
        )
    if step is not None and step not in steps:
        raise UserError(f"--step={step}: is no step of a snapshot; these are {', '.join(map(str, steps))}")
    return [s for s in steps if step is None or s <= step]


def make(workdir: str, std: float, steps: list[int]) -> tuple[str, dict[str, Any]]:
    """Makes the average of width `std` at the last of these steps from the snapshots of all of them.

    Returns (the file that it writes, how it was made). Takes the memory of two copies of the parameters in float32, and
    of the largest array three times. Raises UserError, OSError.
    """
    paths = [snapshots.path_of(workdir, snapshots.SNAPSHOTS, s) for s in steps]
    meta, weights = snapshots.open_file(paths[-1])
    names = configs.average_names(meta["config"])
    if not names:
        raise UserError(f"{paths[-1]}: its config has no averages: move the file away")
    times, stds = np.repeat(steps, len(names)), np.tile([configs.average_std(name) for name in names], len(steps))
    fit, distance = coefficients(times, stds, steps[-1], std)
    fit = fit.reshape(len(steps), len(names))
    total = _weighted_sum(paths, names, fit, weights)
    made = {"std": std, "of": list(names), "steps": steps, "coefficients": fit.tolist(), "distance": distance}
    path = snapshots.path_of(workdir, configs.average_name(std), steps[-1])
    snapshots.write(path, ((name, total[name].astype(np.float32)) for name in total), meta | {"average": made})
    return path, made


def _weighted_sum(paths, names, fit, newest):
    """{path in the parameters: the sum over files and averages in float64}.

    names: of the averages in each file. fit: their coefficients, a row for each file. newest: the arrays of the last.
    """
    leaves = [name.partition("/")[2] for name in newest if name.startswith(f"{names[0]}/")]
    shapes = {f"{name}/{leaf}": newest.arrays[f"{names[0]}/{leaf}"].shape for name in names for leaf in leaves}
    total = {leaf: np.zeros(shapes[f"{names[0]}/{leaf}"]) for leaf in leaves}
    done, size = 0.0, sum(stored.nbytes for stored in newest.arrays.values()) / 1e6
    progress = Progress("average", int(size * len(paths)), "MB")
    for path, row in zip(paths, fit):
        _, weights = snapshots.open_file(path)
        if {name: stored.shape for name, stored in weights.arrays.items()} != shapes:
            raise UserError(f"{path}: holds other arrays than {paths[-1]}: move it away if it is of another run")
        for name, coefficient in zip(names, row):
            for leaf in leaves:
                total[leaf] += np.multiply(weights[f"{name}/{leaf}"], coefficient, dtype=np.float64)
                done += weights.arrays[f"{name}/{leaf}"].nbytes / 1e6
                progress.update(int(done))
    progress.close()
    return total
