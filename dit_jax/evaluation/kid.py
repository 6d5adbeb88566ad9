"""The Kernel Inception Distance (Bińkowski et al., arXiv 1801.01401)."""

import numpy as np

from dit_jax.runtime.errors import UserError

ROWS = 1000  # of a block of the kernel: 50,000 x 8 bytes each


def _sum(a, b):
    """The kernel (x.y / D + 1)^3 summed over all pairs of rows of a and b."""
    total = 0.0
    for start in range(0, len(a), ROWS):
        k = a[start: start + ROWS] @ b.T
        k /= a.shape[1]
        k += 1
        cubes = k * k
        cubes *= k
        total += cubes.sum()
    return total


def _within(x):
    """Its mean over all pairs of two rows of x."""
    n = len(x)
    return (_sum(x, x) - ((np.einsum("ij,ij->i", x, x) / x.shape[1] + 1) ** 3).sum()) / (n * (n - 1))


def kid(samples, reference):
    """samples (N, D), reference (M, D) features -> the unbiased estimate of the squared maximum mean discrepancy
    (equation 4), float64, over all pairs. Others average over random subsets of 1,000, which estimates the same, but
    hangs on chance and on the order of the pictures. Raises UserError where a set has fewer than two."""
    if min(len(samples), len(reference)) < 2:
        raise UserError("KID takes two pictures of each set at least")
    samples, reference = (np.asarray(a, np.float64) for a in (samples, reference))
    across = _sum(samples, reference) / (len(samples) * len(reference))
    return float(_within(samples) + _within(reference) - 2 * across)
