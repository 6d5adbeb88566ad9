"""The Fréchet distance between two Gaussians (arXiv 1706.08500), and the statistics that it takes."""

import numpy as np
from scipy import linalg

from dit_jax.runtime.errors import UserError


class Moments:
    """Mean and covariance of features that come in batches, float64: what np.mean and np.cov give of all at once.

    Attribute: count. By the pairwise update of Chan, Golub and LeVeque (1979): no large numbers are subtracted, whatever
    the features' mean. Rows are kept until there are ROWS, since an update costs much the same for few as for many.
    Blocks of ROWS float32 rows are centred, multiplied in float32 and summed in float64, which moves FID by 1e-8 or
    less; fewer rows, whose covariance may be singular, are multiplied in float64.
    """

    ROWS = 8192

    def __init__(self):
        self.count, self._done, self._mean, self._scatter, self._held = 0, 0, 0.0, 0.0, []

    def add(self, features):
        """features (N, D), any float. Raises UserError where one is not finite."""
        finite = np.isfinite(features).all(1)
        if not finite.all():
            raise UserError(f"the features of picture {self.count + int(np.argmin(finite))} are not finite")
        while len(features):
            part = features[: self._done + self.ROWS - self.count]
            self._held.append(np.array(part, np.result_type(part, np.float32)))  # a copy: the caller's may change
            self.count += len(part)
            features = features[len(part):]
            if self.count - self._done == self.ROWS:
                self._update()

    def _update(self):
        features, self._held = np.concatenate(self._held), []
        n, total = len(features), self.count
        mean = features.mean(0, dtype=np.float64)
        if n < self.ROWS:
            features = features.astype(np.float64)
        np.subtract(features, mean, out=features, casting="same_kind")
        delta = mean - self._mean
        self._scatter = self._scatter + features.T @ features + np.outer(delta, delta) * (self._done * n / total)
        self._mean, self._done = self._mean + delta * (n / total), total

    def statistics(self):
        """Mean (D,) and covariance (D, D) with N - 1. Raises UserError where there are fewer than two."""
        if self.count < 2:
            raise UserError(f"a covariance takes two pictures at least, and there are {self.count}")
        if self.count > self._done:
            self._update()
        return self._mean, self._scatter / (self.count - 1)


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
    # Only the lower half is read. Rounding makes some of a singular product's eigenvalues negative.
    trace = np.sqrt(np.maximum(linalg.eigvalsh(root.T @ sigma1 @ root), 0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)
