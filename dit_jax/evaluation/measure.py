"""Pictures -> statistics -> FID, sFID, Inception Score, precision, recall and KID, as the paper's evaluator takes them."""

import hashlib
from dataclasses import dataclass, field

import jax
import numpy as np

from dit_jax.evaluation import inception_score, kid, precision_recall
from dit_jax.evaluation.frechet import Moments, frechet_distance
from dit_jax.evaluation.references import check_size
from dit_jax.runtime.overlap import ahead
from dit_jax.runtime.progress import Progress

# Names of the metrics in Inception's features; in others' they bear those features' name, lest they be taken for these.
NAMES = ("fid", "sfid", "inception_score", "precision", "recall", "kid")


def shown(kind, count):
    """{metric: what it is called} for so many samples; what is not measured by Inception says so."""
    n = "50K" if count == 50_000 else f"{count}"
    if kind == "inception":
        return {"fid": f"FID-{n}", "sfid": "sFID", "inception_score": "Inception Score", "precision": "precision",
                "recall": "recall", "kid": "KID"}
    return {"fid": f"FD-EffLite0-{n}", "precision": "precision-EffLite0", "recall": "recall-EffLite0",
            "kid": "KD-EffLite0"}


def keys(kind):
    """{metric: its name in the JSON}."""
    return {name: name for name in NAMES} if kind == "inception" else {
        "fid": "fd_efflite0", "precision": "precision_efflite0", "recall": "recall_efflite0", "kid": "kd_efflite0"}


@dataclass
class Measured:
    """What is kept of pictures that went through a network.

    count; shape (H, W, 3) of each; sha256 of all their pixels in order (of a stream that every host has whole); pool and
    spatial: Moments; rows (N, D) float32 of pool, and logits (N, 1008), where they were asked for.
    """
    count: int = 0
    shape: tuple = ()
    sha256: str = ""
    pool: Moments = field(default_factory=Moments)
    spatial: Moments | None = None
    rows: np.ndarray | None = None
    logits: np.ndarray | None = None


def _of_size(batches, size):
    """The same pictures, `size` at a time, whatever the batches they come in: so that the rounding is the same too."""
    held, count = [], 0
    for images in batches:
        held.append(images)
        count += len(images)
        while count >= size:
            joined = np.concatenate(held)
            yield joined[:size]
            held, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(held)


def measure(features, batches, keep=True, on_count=lambda count: None):
    """Features of a stream of pictures, uint8 (n, H, W, 3) at a time, that every host has whole -> Measured.

    features: metrics.features.Features. keep: rows and logits as well, 12 KiB a picture.
    """
    digest = hashlib.sha256()

    def shares():
        for images in _of_size(batches, 4 * len(features.owners)):
            digest.update(np.ascontiguousarray(images))
            yield np.array_split(images, jax.process_count())[jax.process_index()]

    measured = measure_shares(features, shares(), keep, on_count)
    measured.sha256 = digest.hexdigest()
    return measured


def measure_shares(features, shares, keep=False, on_count=lambda count: None):
    """The same of a stream of which every host has its share."""
    measured, rows, logits = Measured(), [], []
    for share in shares:
        now = features(share)
        measured.shape = share.shape[1:]
        measured.pool.add(now.pool)
        if now.spatial is not None:
            measured.spatial = measured.spatial or Moments()
            measured.spatial.add(now.spatial)
        if keep:
            rows.append(now.pool)
            logits.append(now.logits)
        measured.count += len(now.pool)
        on_count(measured.count)
    if keep and rows:
        measured.rows = np.concatenate(rows)
        measured.logits = None if logits[0] is None else np.concatenate(logits)
    return measured


def measure_reference(features, reference):
    """The pictures of a Reference, where it has some, through the network, once; with progress."""
    if reference.images is None or reference.real is not None:
        return
    progress = Progress("reference", reference.images.shape[0], "pictures")
    reference.real = measure(features, ahead(reference.images.batches(256)), on_count=progress.update)
    reference.identity["images_sha256"] = reference.real.sha256
    progress.close()


def compare(features, measured, reference):
    """Measured samples against a Reference -> {metric: float, or None where the reference has not what it takes}.

    The reference's pictures, where it has some, serve precision, recall and KID, and the rest where it has no
    statistics. Raises ValueError where their size is not the samples'.
    """
    check_size(reference, measured.shape)
    measure_reference(features, reference)
    real = reference.real
    mu, sigma, mu_s, sigma_s = reference.mu, reference.sigma, reference.mu_s, reference.sigma_s
    if mu is None:
        mu, sigma = real.pool.statistics()
        mu_s, sigma_s = real.spatial.statistics() if real.spatial else (None, None)
    values = dict.fromkeys(NAMES)
    values["fid"] = frechet_distance(*measured.pool.statistics(), mu, sigma)
    if measured.spatial is not None and mu_s is not None:
        values["sfid"] = frechet_distance(*measured.spatial.statistics(), mu_s, sigma_s)
    if measured.logits is not None:
        values["inception_score"] = inception_score.inception_score(measured.logits)
    if real is not None:
        values["precision"], values["recall"] = precision_recall.precision_recall(measured.rows, real.rows)
        values["kid"] = kid.kid(measured.rows, real.rows)
    return values
