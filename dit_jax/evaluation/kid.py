"""The Kernel Inception Distance (Bińkowski et al., arXiv 1801.01401)."""

import numpy as np
from jaxtyping import Float

from dit_jax.runtime.errors import UserError

ROWS = 1000  # of the kernel matrix at a time: 8 bytes x 50,000 columns each


def _sum(a, b):
    """Returns the kernel (x.y / D + 1)^3 summed over all pairs of rows of a and b."""
    total = 0.0
    for start in range(0, len(a), ROWS):
        k = a[start : start + ROWS] @ b.T
        k /= a.shape[1]
        k += 1
        cubes = k * k
        cubes *= k
        total += cubes.sum()
    return total


def _mean_within(x):
    """Returns the mean of the kernel over all pairs of two different rows of x."""
    n = len(x)
    return (_sum(x, x) - ((np.einsum("ij,ij->i", x, x) / x.shape[1] + 1) ** 3).sum()) / (n * (n - 1))


def kid(samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]) -> float:
    """Returns the unbiased estimate of the squared maximum mean discrepancy of two sets of features (equation 4).

    It is computed in float64 over all pairs. Other implementations average over random subsets of 1,000, which
    estimates the same but depends on chance and on the order of the pictures. Raises UserError if a set has fewer than
    two rows.
    """
    if min(len(samples), len(reference)) < 2:
        raise UserError("KID needs at least two pictures of each set")
    samples, reference = np.asarray(samples, np.float64), np.asarray(reference, np.float64)
    across = _sum(samples, reference) / (len(samples) * len(reference))
    return float(_mean_within(samples) + _mean_within(reference) - 2 * across)
