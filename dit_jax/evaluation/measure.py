"""Statistics of a stream of pictures, as the metrics need them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Float, UInt8

from dit_jax.evaluation.features import Features
from dit_jax.evaluation.frechet import Moments

Batches = Iterable[UInt8[np.ndarray, "n h w 3"]]


@dataclass
class Measured:
    """What is kept of pictures that went through a network.

    shape: (H, W, 3) of each picture. sha256: of all pixels in order, if every host has the whole stream. pool, spatial:
    statistics of the features. rows and logits: pool and logits of each picture, if they were asked for.
    """

    count: int = 0
    shape: tuple[int, ...] = ()
    sha256: str = ""
    pool: Moments = field(default_factory=Moments)
    spatial: Moments | None = None
    rows: Float[np.ndarray, "n d"] | None = None
    logits: Float[np.ndarray, "n k"] | None = None


def _rebatch(batches: Batches, size: int) -> Iterator[np.ndarray]:
    """Yields the same pictures, `size` at a time: rounding does not depend on the batches they come in."""
    pending, count = [], 0
    for images in batches:
        pending.append(images)
        count += len(images)
        while count >= size:
            joined = np.concatenate(pending)
            yield joined[:size]
            pending, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(pending)


def measure(
    features: Features, batches: Batches, keep: bool = True, on_count: Callable[[int], None] = lambda count: None
) -> Measured:
    """Returns the statistics of a stream of pictures that every host has whole.

    keep: rows and logits too, 12 KiB per picture. on_count: called with the number of pictures so far.
    """
    digest = hashlib.sha256()

    def shares():
        for images in _rebatch(batches, 4 * features.global_batch_size):
            digest.update(np.ascontiguousarray(images).data)
            yield np.array_split(images, jax.process_count())[jax.process_index()]

    measured = measure_shares(features, shares(), keep, on_count)
    measured.sha256 = digest.hexdigest()
    return measured


def measure_shares(
    features: Features, shares: Batches, keep: bool = False, on_count: Callable[[int], None] = lambda count: None
) -> Measured:
    """As measure, of a stream that every host has its share of. sha256 stays empty."""
    measured, rows, logits = Measured(), [], []
    for share in shares:
        batch = features(share)
        measured.shape = share.shape[1:]
        measured.pool.add(batch.pool)
        if batch.spatial is not None:
            measured.spatial = measured.spatial or Moments()
            measured.spatial.add(batch.spatial)
        if keep:
            rows.append(batch.pool)
            logits.append(batch.logits)
        measured.count += len(batch.pool)
        on_count(measured.count)
    if keep and rows:
        measured.rows = np.concatenate(rows)
        measured.logits = None if logits[0] is None else np.concatenate(logits)
    return measured
