"""Precision and recall by nearest neighbours (Kynkäänniemi et al., arXiv 1904.06991)."""

import numpy as np

NEIGHBOURS = 3
ROWS = 1000  # of a block of distances: 50,000 x 8 bytes each


def _distances(a, b, scale):
    """Squared distances (len(a), len(b)), float64; of equal rows exactly 0."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    squares[squares < 1e-12 * scale] = 0  # what rounding leaves
    return squares


def _radii(x, k, scale):
    """The squared distance of each row of x to its k-th nearest other row."""
    radii = np.empty(len(x))
    for start in range(0, len(x), ROWS):
        squares = _distances(x[start: start + ROWS], x, scale)
        squares[np.arange(len(squares)), start + np.arange(len(squares))] = np.inf
        radii[start: start + ROWS] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return radii


def precision_recall(samples, reference, k=NEIGHBOURS):
    """samples (N, D), reference (M, D) features -> (precision, recall).

    Precision is the share of samples that lie within the manifold of the reference, i.e. no further from one of its
    points than that point's k-th nearest other; recall the share of the reference within that of the samples. Distances
    are float64, in blocks of ROWS (equations 1 and 2; the evaluator's own are float16). Raises ValueError where a set
    has no k others.
    """
    if min(len(samples), len(reference)) <= k:
        raise ValueError(f"precision and recall with {k} neighbours take {k + 1} pictures of each set, and there are "
                         f"{len(samples)} samples and {len(reference)} reference pictures")
    samples, reference = (np.asarray(a, np.float64) for a in (samples, reference))
    centre = reference.mean(0)
    samples, reference = samples - centre, reference - centre
    scale = max(np.square(a).sum(1).max() for a in (samples, reference))
    of_samples, of_reference = (_radii(a, k, scale) for a in (samples, reference))
    precise, recalled = 0, np.zeros(len(reference), bool)
    for start in range(0, len(samples), ROWS):
        squares = _distances(samples[start: start + ROWS], reference, scale)
        precise += (squares <= of_reference).any(1).sum()
        recalled |= (squares <= of_samples[start: start + ROWS, None]).any(0)
    return float(precise / len(samples)), float(recalled.mean())
