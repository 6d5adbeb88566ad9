"""Pictures -> statistics -> FID, sFID, Inception Score, precision, recall and KID, as the paper's evaluator takes them."""

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import numpy as np

from dit_jax.config import UserError
from dit_jax.data import samples
from dit_jax.logging import Progress
from dit_jax.metrics import inception_score, kid, precision_recall
from dit_jax.metrics.frechet import Moments, frechet_distance
from dit_jax.runtime.files import reading, write_aside
from dit_jax.weights import read_npz

KEYS = ("mu", "sigma", "mu_s", "sigma_s")
# Names of the metrics in Inception's features; in others' they bear those features' name, lest they be taken for these.
NAMES = ("fid", "sfid", "inception_score", "precision", "recall", "kid")
LEAST = 4  # pictures on either side: a row, and the three neighbours of precision and recall


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


def ahead(batches):
    """The same, the next one being read by a thread meanwhile. Not for batches that the devices make: programs of
    theirs that are started by two threads may wait for each other."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (now := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield now


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


@dataclass
class Reference:
    """What is compared with. path; mu, sigma, mu_s, sigma_s: the last two None where there are none; images: a source
    of data.samples, or None; identity: what a report says of it; real: Measured of the images, once they were."""
    path: str
    mu: np.ndarray | None
    sigma: np.ndarray | None
    mu_s: np.ndarray | None
    sigma_s: np.ndarray | None
    images: object
    identity: dict
    real: Measured | None = None


def load_reference(path, features):
    """A reference from a folder of PNGs, or from an .npz with `mu`, `sigma`, `mu_s`, `sigma_s` (as published, or of
    dit_jax.reference), with pictures `arr_0`, or with both.

    features: metrics.features.Features, with which it shall be compared; a file of our own says with which it was made.
    Raises ValueError naming the file.
    """
    identity = {"file": os.path.basename(os.path.abspath(path))}
    if os.path.isdir(path):
        images = _enough(path, samples.Pngs(path))
        return Reference(path, None, None, None, None, images, identity | {"images": images.shape[0]})
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file: name a reference, an .npz or a folder of PNGs")
    with reading(path, "a reference", "is no reference, cut short or damaged ({reason})"):
        return _load_npz(path, features, identity)


def _enough(path, images):
    if images.shape[0] < LEAST:
        raise UserError(f"{path}: holds {images.shape[0]} pictures; a reference takes {LEAST} at least")
    return images


def _load_npz(path, features, identity):
    name, sha256, (width, spatial_width) = features.name, features.sha256, features.widths
    there, arrays, images = read_npz(path), dict.fromkeys(KEYS), None
    with open(path, "rb") as f:
        identity["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    made = json.loads(str(there["manifest"].read())) if "manifest" in there else None
    if not (isinstance(made, dict) and {"features", "features_sha256"} <= made.keys()):
        made = None  # of somebody else's file: other keys than the published ones say nothing here
    identity |= {"made": made} if made else {}
    if made and not (all(isinstance(made[key], str) and made[key].isprintable() for key in ("features", "features_sha256"))
                     and type(made.get("size", 0)) is int):
        raise ValueError("its manifest names no features, or a size that is none")
    if made and (made["features"], made["features_sha256"]) != (name, sha256):
        raise UserError(f"{path}: was made for {made['features']:.40} with weights of sha256 "
                        f"{made['features_sha256']:.16}..., not for {name} with {sha256[:16]}...: make it again with "
                        "dit_jax.reference")
    if samples.KEY in there:
        images = _enough(path, samples.Npz(path))
        identity["images"] = images.shape[0]
    if "mu" not in there and images is None:
        raise UserError(f"{path}: holds neither mu and sigma nor pictures arr_0: this is no reference")
    for mean, cov, size in (("mu", "sigma", width), ("mu_s", "sigma_s", spatial_width)):
        if mean not in there or size is None:
            continue
        shapes = [there[key].shape if key in there else None for key in (mean, cov)]
        if shapes != [(size,), (size, size)]:
            raise UserError(f"{path}: {mean} is of {shapes[0]} and {cov} of {shapes[1]}; the features of {name} take "
                            f"{(size,)} and {(size, size)}")
        for key in (mean, cov):
            arrays[key] = there[key].read()
            if arrays[key].dtype.kind != "f" or not (np.abs(arrays[key]) < 1e30).all():
                raise UserError(f"{path}: {mean} or {cov} holds numbers that are not finite")
    return Reference(path, *(arrays[key] for key in KEYS), images, identity)


def save_reference(path, measured, images, manifest):
    """Writes an .npz of `mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0` (images, or None) and `manifest` (JSON)."""
    arrays = dict(zip(KEYS, measured.pool.statistics()))
    if measured.spatial is not None:
        arrays |= dict(zip(KEYS[2:], measured.spatial.statistics()))
    if images is not None:
        arrays[samples.KEY] = images
    data = io.BytesIO()
    np.savez(data, manifest=json.dumps(manifest, sort_keys=True), **arrays)
    write_aside(path, data.getbuffer())


def check_size(reference, shape):
    """ValueError where what is known of a Reference's pictures is of another size than samples of `shape` (H, W, 3)."""
    path, size = reference.path, (reference.identity.get("made") or {}).get("size")
    there = tuple(reference.images.shape[1:]) if reference.images is not None else (size, size, 3)
    if (reference.images is not None or size) and there != tuple(shape):
        raise ValueError(f"{path}: its pictures are of {there[1]} x {there[0]} pixels, and the samples of {shape[1]} x "
                         f"{shape[0]}: name a reference of their size")


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
