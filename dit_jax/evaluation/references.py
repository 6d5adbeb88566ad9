"""References: what samples are compared with. An .npz of statistics and pictures, or a folder of PNGs."""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_jax.evaluation import samples
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading, write_aside
from dit_jax.weights.files import read_npz

KEYS = ("mu", "sigma", "mu_s", "sigma_s")
LEAST = 4  # pictures on either side: a row, and the three neighbours of precision and recall


@dataclass
class Reference:
    """What is compared with. path; mu, sigma, mu_s, sigma_s: the last two None where there are none; images: a source
    of data.samples, or None; identity: what a report says of it; real: what measure.measure made of the
    images, once it did."""
    path: str
    mu: np.ndarray | None
    sigma: np.ndarray | None
    mu_s: np.ndarray | None
    sigma_s: np.ndarray | None
    images: object
    identity: dict
    real: Any = None


def load_reference(path, features):
    """A reference from a folder of PNGs, or from an .npz with `mu`, `sigma`, `mu_s`, `sigma_s` (as published, or of
    dit_jax.reference), with pictures `arr_0`, or with both.

    features: metrics.features.Features, with which it shall be compared; a file of our own says with which it was made.
    Raises UserError naming the file.
    """
    identity = {"file": os.path.basename(os.path.abspath(path))}
    if os.path.isdir(path):
        images = _enough(path, samples.Pngs(path))
        return Reference(path, None, None, None, None, images, identity | {"images": images.shape[0]})
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file: name a reference, an .npz or a folder of PNGs")
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
        raise UserError("its manifest names no features, or a size that is none")
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
    """UserError where what is known of a Reference's pictures is of another size than samples of `shape` (H, W, 3)."""
    path, size = reference.path, (reference.identity.get("made") or {}).get("size")
    there = tuple(reference.images.shape[1:]) if reference.images is not None else (size, size, 3)
    if (reference.images is not None or size) and there != tuple(shape):
        raise UserError(f"{path}: its pictures are of {there[1]} x {there[0]} pixels, and the samples of {shape[1]} x "
                         f"{shape[0]}: name a reference of their size")
