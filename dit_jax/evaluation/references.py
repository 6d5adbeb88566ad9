"""References that samples are compared with: an .npz of statistics, of pictures or of both, or a folder of PNGs."""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from dit_jax.evaluation import samples
from dit_jax.evaluation.features import Features
from dit_jax.evaluation.measure import Measured, measure
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading, writing
from dit_jax.runtime.overlap import ahead
from dit_jax.runtime.progress import Progress, waiting
from dit_jax.weights.archive import read_npz

KEYS = ("mu", "sigma", "mu_s", "sigma_s")
MIN_PICTURES = 4  # of samples and of a reference: precision and recall take one row and its three neighbours


@dataclass
class Reference:
    """A reference. What it does not have is None.

    mu, sigma: of pool. mu_s, sigma_s: of spatial. identity: what a report says of it. measured: the statistics of its
    images, once measure_reference was called.
    """

    path: str
    identity: dict[str, Any]
    images: samples.Npz | samples.Pngs | None = None
    mu: Float[np.ndarray, " d"] | None = None
    sigma: Float[np.ndarray, "d d"] | None = None
    mu_s: Float[np.ndarray, " s"] | None = None
    sigma_s: Float[np.ndarray, "s s"] | None = None
    measured: Measured | None = None


@waiting("reading the reference")
def load_reference(path: str, features: Features) -> Reference:
    """Returns the reference in a folder of PNGs, or in an .npz with `mu`, `sigma`, `mu_s`, `sigma_s` (as published, or
    from dit_jax.reference), with pictures `arr_0`, or with both.

    features: those that it is to be compared in. A file from dit_jax.reference says for which features it was made.
    Raises UserError naming the file.
    """
    identity = {"file": os.path.basename(os.path.abspath(path))}
    if os.path.isdir(path):
        images = _check_count(samples.Pngs(path))
        return Reference(path, identity | {"images": images.shape[0]}, images)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file: name a reference, an .npz or a folder of PNGs")
    with reading(path, "a reference", "is no reference, cut short or damaged ({reason})"):
        return _load_npz(path, features, identity)


def _check_count(images):
    if images.shape[0] < MIN_PICTURES:
        raise UserError(f"{images.path}: holds {images.shape[0]} pictures; a reference needs at least {MIN_PICTURES}")
    return images


def _load_npz(path, features, identity):
    stored, images = read_npz(path), None
    with open(path, "rb") as f:
        identity["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    if "manifest" in stored and (manifest := _read_manifest(path, stored["manifest"], features)):
        identity["made"] = manifest
    if samples.KEY in stored:
        images = _check_count(samples.Npz(path))
        identity["images"] = images.shape[0]
    if "mu" not in stored and images is None:
        raise UserError(f"{path}: holds neither mu and sigma nor pictures arr_0: this is no reference")
    arrays, (width, spatial_width) = {}, features.widths
    for mean, cov, size in (("mu", "sigma", width), ("mu_s", "sigma_s", spatial_width)):
        if mean not in stored or size is None:
            continue
        shapes = [stored[key].shape if key in stored else None for key in (mean, cov)]
        if shapes != [(size,), (size, size)]:
            raise UserError(
                f"{path}: {mean} is of {shapes[0]} and {cov} of {shapes[1]}; the features of {features.name} take "
                f"{(size,)} and {(size, size)}"
            )
        for key in (mean, cov):
            arrays[key] = stored[key].read()
            if arrays[key].dtype.kind != "f" or not (np.abs(arrays[key]) < 1e30).all():
                raise UserError(f"{path}: {mean} or {cov} holds numbers that are not finite")
    return Reference(path, identity, images, **arrays)


def _read_manifest(path, stored, features):
    """Returns the manifest of dit_jax.reference, or None if another program made the file: its keys mean nothing here.

    Raises UserError if the manifest is damaged, or names other features.
    """
    made, keys = json.loads(str(stored.read())), ("features", "features_sha256")
    if not isinstance(made, dict) or not made.keys() >= set(keys):
        return None
    printable = all(isinstance(made[key], str) and made[key].isprintable() for key in keys)
    if not printable or type(made.get("size", 0)) is not int:
        raise UserError(f"{path}: its manifest names no features, or its size is no number: make it again")
    if (made["features"], made["features_sha256"]) != (features.name, features.sha256):
        raise UserError(
            f"{path}: was made for {made['features']:.40} with weights of sha256 "
            f"{made['features_sha256']:.16}..., not for {features.name} with {features.sha256[:16]}...: make it again "
            "with dit_jax.reference"
        )
    return made


def save_reference(
    path: str, measured: Measured, images: UInt8[np.ndarray, "n h w 3"] | None, manifest: dict[str, Any]
) -> None:
    """Writes an .npz of `mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0` (the images) and `manifest` (JSON)."""
    arrays: dict[str, Any] = dict(zip(KEYS, measured.pool.statistics()))
    if measured.spatial is not None:
        arrays |= dict(zip(KEYS[2:], measured.spatial.statistics()))
    if images is not None:
        arrays[samples.KEY] = images
    data = io.BytesIO()
    np.savez(data, manifest=json.dumps(manifest, sort_keys=True), **arrays)
    with writing(path) as f:
        f.write(data.getbuffer())


def check_size(reference: Reference, shape: tuple[int, ...]) -> None:
    """Raises UserError if the reference's pictures are known to be of another size than samples of shape (H, W, 3)."""
    size = (reference.identity.get("made") or {}).get("size")
    if reference.images is not None:
        expected = tuple(reference.images.shape[1:])
    elif size:
        expected = (size, size, 3)
    else:
        return
    if expected != tuple(shape):
        raise UserError(
            f"{reference.path}: its pictures are of {expected[1]} x {expected[0]} pixels, and the samples of "
            f"{shape[1]} x {shape[0]}: name a reference of their size"
        )


def measure_reference(features: Features, reference: Reference) -> None:
    """Sets reference.measured from its pictures, if it has some and they were not measured yet. Shows progress."""
    if reference.images is None or reference.measured is not None:
        return
    progress = Progress("reference", reference.images.shape[0], "pictures")
    batches = ahead(reference.images.batches(256))
    reference.measured = measure(features, batches, on_count=progress.update)
    reference.identity["images_sha256"] = reference.measured.sha256
    progress.close()
