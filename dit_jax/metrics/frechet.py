"""The Fréchet distance between two Gaussians (arXiv 1706.08500), and the statistics that it takes."""

import numpy as np
from scipy import linalg


class Moments:
    """Mean and covariance of features that come in batches, float64: what np.mean and np.cov give of all at once.

    Attributes: count; mean (D,). By the pairwise update of Chan, Golub and LeVeque (1979): no large numbers are
    subtracted, whatever the features' mean.
    """

    def __init__(self):
        self.count, self.mean, self._scatter = 0, 0.0, 0.0

    def add(self, features):
        """features (N, D), any float. Raises ValueError where one is not finite."""
        features = np.array(features, np.float64)
        n = len(features)
        if not n:
            return
        if not np.isfinite(features).all():
            raise ValueError(f"the features of picture {self.count + int(np.argmin(np.isfinite(features).all(1)))} are "
                             "not finite")
        mean = features.mean(0)
        features -= mean
        delta, total = mean - self.mean, self.count + n
        self._scatter = self._scatter + features.T @ features + np.outer(delta, delta) * (self.count * n / total)
        self.mean, self.count = self.mean + delta * (n / total), total

    def statistics(self):
        """Mean (D,) and covariance (D, D) with N - 1. Raises ValueError where there are fewer than two."""
        if self.count < 2:
            raise ValueError(f"a covariance takes two pictures at least, and there are {self.count}")
        return self.mean, self._scatter / (self.count - 1)


def statistics(features):
    """(N, D) -> mean (D,) and covariance (D, D) with N - 1, float64."""
    moments = Moments()
    moments.add(features)
    return moments.statistics()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), of arrays (D,) and (D, D).

    sigma1 sigma2 has the eigenvalues of L' sigma1 L, where sigma2 = L L', which is symmetric: no root of a matrix is
    needed. L is Cholesky's factor, and where sigma2 is singular, its symmetric root.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    try:
        root = linalg.cholesky(sigma2, lower=True)
    except linalg.LinAlgError:
        values, vectors = linalg.eigh(sigma2)
        root = vectors * np.sqrt(np.maximum(values, 0))
    product = root.T @ sigma1 @ root
    # Rounding makes some of a singular product's eigenvalues negative.
    trace = np.sqrt(np.maximum(linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)
