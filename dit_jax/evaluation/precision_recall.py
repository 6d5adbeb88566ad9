"""Precision and recall by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991)."""

import numpy as np

from dit_jax.runtime.errors import UserError

NEIGHBOURS = 3
ROWS = 1000  # of a block of distances: 50,000 x 8 bytes each


def _blocks(a, b, zero):
    """(start, squared distances of a[start: start + ROWS] to b), float64; what is below `zero` is 0: of equal rows
    rounding leaves that much."""
    lengths = np.einsum("ij,ij->i", b, b)
    for start in range(0, len(a), ROWS):
        rows = a[start: start + ROWS]
        squares = rows @ b.T
        squares *= -2
        squares += lengths
        squares += np.einsum("ij,ij->i", rows, rows)[:, None]
        squares[squares < zero] = 0
        yield start, squares


def _radii(x, k, zero):
    """The squared distance of each row of x to its k-th nearest other row."""
    radii = np.empty(len(x))
    for start, squares in _blocks(x, x, zero):
        squares[np.arange(len(squares)), start + np.arange(len(squares))] = np.inf
        squares.partition(k - 1, axis=1)
        radii[start: start + len(squares)] = squares[:, k - 1]
    return radii


def precision_recall(samples, reference, k=NEIGHBOURS):
    """samples (N, D), reference (M, D) features -> (precision, recall).

    Precision is the share of samples that lie within the manifold of the reference, i.e. no further from one of its
    points than that point's k-th nearest other; recall the share of the reference within that of the samples. Distances
    are float64, in blocks of ROWS (equations 1 and 2; the evaluator's own are float16). Raises UserError where a set
    has no k others.
    """
    if min(len(samples), len(reference)) <= k:
        raise UserError(f"precision and recall with {k} neighbours take {k + 1} pictures of each set, and there are "
                         f"{len(samples)} samples and {len(reference)} reference pictures")
    centre = reference.mean(0, dtype=np.float64)
    samples, reference = samples - centre, reference - centre
    zero = 1e-12 * max(np.einsum("ij,ij->i", a, a).max() for a in (samples, reference))
    of_samples, of_reference = (_radii(a, k, zero) for a in (samples, reference))
    precise, recalled = 0, np.zeros(len(reference), bool)
    for start, squares in _blocks(samples, reference, zero):
        precise += (squares <= of_reference).any(1).sum()
        recalled |= (squares <= of_samples[start: start + len(squares), None]).any(0)
    return float(precise / len(samples)), float(recalled.mean())
