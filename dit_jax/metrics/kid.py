"""The Kernel Inception Distance (Bińkowski et al., arXiv 1801.01401)."""

import numpy as np

SUBSETS, SUBSET_SIZE = 100, 1000


def _mmd(x, y):
    """The unbiased estimate of the squared maximum mean discrepancy (equation 4), kernel (x.y / D + 1)^3."""
    n, d = x.shape
    kxx, kyy, kxy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kxx, kyy)) - 2 * kxy.mean()


def kid(samples, reference, subsets=SUBSETS, size=SUBSET_SIZE, seed=0):
    """samples (N, D), reference (M, D) features -> the mean over random subsets of `size` pictures each (or as many as
    both sets have), drawn without replacement, float64. Raises ValueError where a set has fewer than two."""
    size = min(size, len(samples), len(reference))
    if size < 2:
        raise ValueError("KID takes two pictures of each set at least")
    rng, values = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (a[rng.choice(len(a), size, replace=False)].astype(np.float64) for a in (samples, reference))
        values.append(_mmd(x, y))
    return float(np.mean(values))
