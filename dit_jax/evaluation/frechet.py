"""The Fréchet distance between two Gaussians (arXiv 1706.08500), and the statistics that it needs."""

import numpy as np
from jaxtyping import Float
from scipy import linalg

from dit_jax.runtime.errors import UserError

Mean = Float[np.ndarray, " d"]
Covariance = Float[np.ndarray, "d d"]


class Moments:
    """Mean and covariance in float64 of features that are added in batches: those of np.mean and np.cov of all rows.

    They are updated pairwise (Chan, Golub and LeVeque, 1979), which subtracts no large numbers, whatever the features'
    mean. Rows are collected until there are ROWS of them, because an update takes about as long for few rows as for
    many. Full blocks of float32 rows are centred and multiplied in float32 and summed in float64, which changes FID by
    1e-8 or less. A shorter block, whose covariance may be singular, is multiplied in float64.

    Attributes:
      count: rows added.
    """

    ROWS = 8192

    def __init__(self) -> None:
        self.count, self._updated = 0, 0  # rows added; rows that mean and scatter already include
        self._mean: np.ndarray | float = 0.0
        self._scatter: np.ndarray | float = 0.0
        self._pending: list[np.ndarray] = []

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        """Adds rows of any floating-point type. Raises UserError if one is not finite."""
        finite = np.isfinite(features).all(1)
        if not finite.all():
            raise UserError(f"the features of picture {self.count + int(np.argmin(finite))} are not finite")
        while len(features):
            part = features[: self._updated + self.ROWS - self.count]
            self._pending.append(np.array(part, np.result_type(part, np.float32)))  # a copy: the caller's may change
            self.count += len(part)
            features = features[len(part) :]
            if self.count - self._updated == self.ROWS:
                self._update()

    def _update(self):
        features, self._pending = np.concatenate(self._pending), []
        n, total = len(features), self.count
        mean = features.mean(0, dtype=np.float64)
        if n < self.ROWS:
            features = features.astype(np.float64)
        np.subtract(features, mean, out=features, casting="same_kind")
        delta = mean - self._mean
        self._scatter = self._scatter + features.T @ features + np.outer(delta, delta) * (self._updated * n / total)
        self._mean, self._updated = self._mean + delta * (n / total), total

    def statistics(self) -> tuple[Mean, Covariance]:
        """Returns mean and covariance (divided by N - 1). Raises UserError if there are fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least two pictures, and there are {self.count}")
        if self.count > self._updated:
            self._update()
        return np.asarray(self._mean), np.asarray(self._scatter / (self.count - 1))


def statistics(features: Float[np.ndarray, "n d"]) -> tuple[Mean, Covariance]:
    """Returns mean and covariance (divided by N - 1) in float64. Raises UserError as Moments."""
    moments = Moments()
    moments.add(features)
    return moments.statistics()


def frechet_distance(mu1: Mean, sigma1: Covariance, mu2: Mean, sigma2: Covariance) -> float:
    """Returns |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    No root of a matrix is needed: sigma1 sigma2 has the eigenvalues of the symmetric L' sigma1 L, where sigma2 = L L'.
    L is Cholesky's factor, or the symmetric root if sigma2 is singular.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    try:
        root = linalg.cholesky(sigma2, lower=True)
    except linalg.LinAlgError:
        values, vectors = linalg.eigh(sigma2)
        root = vectors * np.sqrt(np.maximum(values, 0))
    # eigvalsh reads only the lower half. Rounding makes some eigenvalues of a singular product negative.
    trace = np.sqrt(np.maximum(linalg.eigvalsh(root.T @ sigma1 @ root), 0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)
