"""Precision and recall by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991)."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from dit_jax.runtime.errors import UserError

NEIGHBOURS = 3
ROWS = 1000  # of the distance matrix at a time: 8 bytes x 50,000 columns each


def _blocks(a, b, zero) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (start, squared distances of a[start : start + ROWS] to b), float64.

    A distance below `zero` becomes 0: rounding leaves that much between equal rows.
    """
    lengths = np.einsum("ij,ij->i", b, b)
    for start in range(0, len(a), ROWS):
        rows = a[start : start + ROWS]
        squares = rows @ b.T
        squares *= -2
        squares += lengths
        squares += np.einsum("ij,ij->i", rows, rows)[:, None]
        squares[squares < zero] = 0
        yield start, squares


def _radii(x, k, zero):
    """Returns the squared distance of each row of x to its k-th nearest other row."""
    radii = np.empty(len(x))
    for start, squares in _blocks(x, x, zero):
        squares[np.arange(len(squares)), start + np.arange(len(squares))] = np.inf
        squares.partition(k - 1, axis=1)
        radii[start : start + len(squares)] = squares[:, k - 1]
    return radii


def precision_recall(
    samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"], k: int = NEIGHBOURS
) -> tuple[float, float]:
    """Returns precision and recall of two sets of features (equations 1 and 2).

    Precision is the share of samples within the manifold of the reference: no further from one of its points than that
    point's k-th nearest other point. Recall is the share of the reference within the manifold of the samples. Distances
    are float64; the paper's evaluator uses float16. Raises UserError if a set has no more than k rows.
    """
    if min(len(samples), len(reference)) <= k:
        raise UserError(
            f"precision and recall with {k} neighbours need {k + 1} pictures of each set, and there are "
            f"{len(samples)} samples and {len(reference)} reference pictures"
        )
    centre = reference.mean(0, dtype=np.float64)
    samples, reference = samples - centre, reference - centre
    zero = 1e-12 * max(np.einsum("ij,ij->i", a, a).max() for a in (samples, reference))
    sample_radii, reference_radii = (_radii(a, k, zero) for a in (samples, reference))
    precise, recalled = 0, np.zeros(len(reference), bool)
    for start, squares in _blocks(samples, reference, zero):
        precise += (squares <= reference_radii).any(1).sum()
        recalled |= (squares <= sample_radii[start : start + len(squares), None]).any(0)
    return float(precise / len(samples)), float(recalled.mean())
