"""The Fréchet distance between two Gaussians (arXiv 1706.08500)."""

import numpy as np


def statistics(features):
    """(N, D) -> mean (D,) and covariance (D, D) with N - 1, float64."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    The trace of the root is that of (R sigma2 R)^(1/2), R the symmetric root of sigma1: only eigenvalues of symmetric
    matrices are needed, and singular ones do no harm.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    trace = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ sigma2 @ root), 0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)
