"""FID, sFID, Inception Score, precision, recall and KID of samples against a reference, as in the paper's evaluator."""

from dit_jax.evaluation import inception_score, kid, precision_recall
from dit_jax.evaluation.features import Features
from dit_jax.evaluation.frechet import frechet_distance
from dit_jax.evaluation.measure import Measured
from dit_jax.evaluation.references import Reference, check_size, measure_reference
from dit_jax.runtime.progress import waiting

NAMES = ("fid", "sfid", "inception_score", "precision", "recall", "kid")


def display_names(kind: str, count: int) -> dict[str, str]:
    """Returns {metric: its name in tables} for features of this kind (features.load) and so many samples.

    Metrics in the features of another network than Inception bear that network's name, so that nobody takes them for
    FID.
    """
    n = "50K" if count == 50_000 else f"{count}"
    if kind == "inception":
        return {
            "fid": f"FID-{n}",
            "sfid": "sFID",
            "inception_score": "Inception Score",
            "precision": "precision",
            "recall": "recall",
            "kid": "KID",
        }
    return {
        "fid": f"FD-EffLite0-{n}",
        "precision": "precision-EffLite0",
        "recall": "recall-EffLite0",
        "kid": "KD-EffLite0",
    }


def json_keys(kind: str) -> dict[str, str]:
    """Returns {metric: its key in JSON} for features of this kind (features.load)."""
    if kind == "inception":
        return {name: name for name in NAMES}
    return {
        "fid": "fd_efflite0",
        "precision": "precision_efflite0",
        "recall": "recall_efflite0",
        "kid": "kd_efflite0",
    }


@waiting("comparing the samples with the reference")
def compare(features: Features, measured: Measured, reference: Reference) -> dict[str, float | None]:
    """Returns {metric: value} of measured samples. A value is None if the reference lacks what it needs.

    Precision, recall and KID need the reference's pictures. The other metrics use its statistics, or those of its
    pictures if it has no statistics. Raises UserError if the reference's pictures are not of the samples' size.
    """
    check_size(reference, measured.shape)
    measure_reference(features, reference)
    real = reference.measured
    mu, sigma, mu_s, sigma_s = reference.mu, reference.sigma, reference.mu_s, reference.sigma_s
    if mu is None:
        assert real is not None
        mu, sigma = real.pool.statistics()
        mu_s, sigma_s = real.spatial.statistics() if real.spatial else (None, None)
    assert sigma is not None
    values: dict[str, float | None] = dict.fromkeys(NAMES)
    values["fid"] = frechet_distance(*measured.pool.statistics(), mu, sigma)
    if measured.spatial is not None and mu_s is not None and sigma_s is not None:
        values["sfid"] = frechet_distance(*measured.spatial.statistics(), mu_s, sigma_s)
    if measured.logits is not None:
        values["inception_score"] = inception_score.inception_score(measured.logits)
    if real is not None:
        assert measured.rows is not None and real.rows is not None
        values["precision"], values["recall"] = precision_recall.precision_recall(measured.rows, real.rows)
        values["kid"] = kid.kid(measured.rows, real.rows)
    return values
