"""The child that times the metrics, on noise in the place of features: FID with its statistics, precision and recall.

Beside them stand their usual forms: np.cov with scipy's sqrtm, and scikit-learn's neighbours.
"""

import numpy as np

from benchmarks.speed.child import Timed, serve
from dit_jax import cli
from dit_jax.evaluation import frechet
from dit_jax.evaluation.precision_recall import NEIGHBOURS, precision_recall


def fid(samples, mu, sigma):
    """Returns the distance of samples (N, D) from a mean and a covariance, by this package."""
    return frechet.frechet_distance(*frechet.statistics(samples), mu, sigma)


def usual_fid(samples, mu, sigma):
    """Returns the same as `fid` by np.cov and scipy's sqrtm."""
    from scipy.linalg import sqrtm

    mean, covariance = samples.mean(0, dtype=np.float64), np.cov(samples, rowvar=False)
    root = np.real(np.asarray(sqrtm(covariance @ sigma)))
    return float(np.square(mean - mu).sum() + np.trace(covariance + sigma - 2 * root))


def usual_precision_recall(samples, reference):
    """Returns the same as precision_recall by scikit-learn's neighbours."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    def radii(x):  # a row is its own nearest neighbour
        return NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute").fit(x).kneighbors(x)[0][:, -1]

    of_samples, of_reference, start = radii(samples), radii(reference), 0
    precise, recalled = 0, np.zeros(len(reference), bool)
    for distances in pairwise_distances_chunked(samples, reference):
        precise += (distances <= of_reference).any(1).sum()
        recalled |= (distances <= of_samples[start : start + len(distances), None]).any(0)
        start += len(distances)
    return float(precise / len(samples)), float(recalled.mean())


def make(spec):
    """Returns a Timed whose call computes a metric.

    spec: metric, "FID" or "precision, recall"; usual, whether in the usual form; shapes, of samples and reference.
    """
    rng = np.random.default_rng(0)
    samples, reference = (rng.standard_normal(shape, np.float32) for shape in spec["shapes"])
    if spec["metric"] == "FID":
        function, (mu, sigma) = usual_fid if spec["usual"] else fid, frechet.statistics(reference)
        del reference
        return Timed(lambda: {"value": function(samples, mu, sigma)}, {"images": len(samples)})
    metric = usual_precision_recall if spec["usual"] else precision_recall
    return Timed(lambda: {"value": metric(samples, reference)}, {"images": len(samples)})


if __name__ == "__main__":
    cli.parse()
    cli.run(lambda: serve(make))
