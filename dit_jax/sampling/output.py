"""Writes samples into a folder: samples.npz, a manifest, a grid and single pictures. Parts allow it to resume."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Shaped
from numpy.typing import DTypeLike

from dit_jax.runtime import files, hosts, images as pictures
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import duration, say

if TYPE_CHECKING:
    from dit_jax.sampling.model import Samples

GRID_IMAGES = 100
STRIP_IMAGES, STRIP_MOMENTS = 4, 8  # the rows and columns of strip.png
SHA256 = "samples_sha256"  # field of a manifest: the sha256 of the finished samples.npz

Images = Shaped[np.ndarray, "n h w c"]  # uint8 pictures, or float32


class Parts:
    """The images made so far, in OUT/parts, consecutive from image 0.

    The name of a file is START-COUNT-HASH.npy: which images it holds, and a hash of these numbers, the settings and its
    bytes. A file that does not match its name, or does not follow the one before, is moved to OUT/damaged with a line
    that says so.

    Args:
      out: the folder.
      settings: text of everything that the images depend on.
      shape, dtype: of all images, (N, H, W, C).
    Attributes: files (paths), done (number of images).
    """

    def __init__(self, out: str, settings: str, shape: tuple[int, ...], dtype: DTypeLike):
        self.folder, self.files, self.done = os.path.join(out, "parts"), [], 0
        self.settings, self.shape, self.dtype = settings, shape, np.dtype(dtype)
        os.makedirs(self.folder, exist_ok=True)
        for name in sorted(os.listdir(self.folder)):
            path = os.path.join(self.folder, name)
            if name.endswith(".part") and os.path.isfile(path):  # cut short by a kill
                os.remove(path)
            elif not self._take(path):
                set_aside(out, path, "is no part of these samples, is damaged, or comes after one that is")

    def _take(self, path):
        """Adds the file if it is the next part. Returns whether it is."""
        fields = re.fullmatch(r"(\d{12})-(\d+)-[0-9a-f]{16}\.npy", os.path.basename(path))
        if not fields or int(fields[1]) != self.done or not os.path.isfile(path):
            return False
        if os.path.getsize(path) > 2 * self.dtype.itemsize * math.prod(self.shape):
            return False
        with open(path, "rb") as f:
            data = f.read()
        if path != self._path(int(fields[2]), data):
            return False
        self._add(path, int(fields[2]))
        return True

    def _path(self, count, data):
        digest = hashlib.sha256(f"{self.done} {count} {self.settings}".encode() + data).hexdigest()[:16]
        return os.path.join(self.folder, f"{self.done:012d}-{count}-{digest}.npy")

    def _add(self, path, count):
        self.files.append(path)
        self.done += count

    def append(self, images: Images) -> None:
        """Writes the next images as a part."""
        data = io.BytesIO()
        np.save(data, images)
        path = self._path(len(images), data.getvalue())
        write_aside(path, data.getvalue())
        self._add(path, len(images))

    def first(self, count: int) -> Images:
        """Returns the first `count` images, of all parts that they are in."""
        found, start = [], 0
        for file in self.files:
            if start < count:
                found.append(np.load(file))
                start += len(found[-1])
        return np.concatenate(found)[:count]

    def write_npz(self, path: str, key: str) -> None:
        """Writes all parts as one array of an .npz. Parts are streamed: 50,000 pictures need not fit in memory."""
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        with files.writing(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array_header_1_0(f, header)
                for file in self.files:
                    f.write(np.ascontiguousarray(np.load(file)).tobytes())

    def remove(self) -> None:
        """Deletes OUT/parts."""
        shutil.rmtree(self.folder)


def set_aside(out: str, path: str, why: str) -> None:
    """Moves a file to OUT/damaged, with a line that says so."""
    damaged = os.path.join(out, "damaged")
    os.makedirs(damaged, exist_ok=True)
    os.replace(path, os.path.join(damaged, os.path.basename(path)))
    say(f"{path}: {why}: moved to {damaged}, and made again")


def write_manifest(path: str, manifest: dict[str, Any]) -> None:
    """Writes a manifest as JSON."""
    write_aside(path, (json.dumps(manifest, indent=2) + "\n").encode())


def sha256_of(path: str) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def same_manifest(path: str, manifest: dict[str, Any]) -> tuple[bool, str | None]:
    """Returns (whether `path` holds this manifest, the sha256 of the finished samples or None).

    Raises UserError naming the settings that differ if it holds another manifest.
    """
    if not os.path.exists(path):
        return False, None
    existing = files.read_json(path)
    if existing is None:
        raise UserError(f"{path}: is damaged, so how the files beside it were made is unknown; use another --out")
    digest = existing.pop(SHA256, None)
    differ = [
        f"{key} ({existing.get(key)!r} there, {manifest.get(key)!r} here)"
        for key in {**existing, **manifest}
        if existing.get(key) != manifest.get(key)
    ]
    if differ:
        raise UserError(f"{path}: what is here was made with other settings: {', '.join(differ)}; use another --out")
    return True, digest


def is_whole(path: str, key: str, shape: tuple[int, ...], dtype: DTypeLike, digest: str | None) -> bool:
    """Whether `path` is an .npz with such an array under `key`, and every byte is as it was written.

    digest: the sha256 of the file; None in older manifests, and then the zip's own checksum is compared.
    """
    try:
        if digest and sha256_of(path) != digest:
            return False
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as f:
            np.lib.format.read_magic(f)
            header = np.lib.format.read_array_header_1_0(f)
            size = f.tell() + math.prod(shape) * np.dtype(dtype).itemsize
            if header != (shape, False, dtype) or archive.getinfo(f"{key}.npy").file_size != size:
                return False
            while f.read(2**20):  # to its end, where zipfile compares the checksum
                pass
        return True
    except Exception:  # parsers raise nearly everything on damaged files
        return False


def write_pictures(out: str, arrays: Iterable[Images], samples: "Samples", single: bool) -> None:
    """Writes grid.png of the first images; with `single`, also each image as png/NUMBER.png.

    arrays: the images in order. The grid has a column a class if there are few.
    """
    first, start = [], 0
    for images in arrays:
        if single:
            for i, image in enumerate(images, start):
                write_aside(os.path.join(out, "png", f"{i:06d}.png"), pictures.png(image))
        if start < GRID_IMAGES:
            first.append(images)
        start += len(images)
    first = np.concatenate(first)[:GRID_IMAGES]
    classes = len(set(samples.labels.tolist()))
    columns = min(classes if classes > 1 else math.isqrt(len(first)), 10)
    _write_grid(os.path.join(out, "grid.png"), first, columns, samples.texts and samples.texts[: len(first)])


def write_strip(out: str, moments: list[Images], images: Images, texts: list[str | int] | None) -> None:
    """Writes strip.png: noise turning into pictures, a row a sample.

    moments: the samples as they form, from the noise on. images: the finished ones, which stand for the last moment:
    they may have been made in batches of another size, which rounds differently.
    """
    shown = pictures.strip([*moments[:-1], images])
    texts = texts and [text for text in texts[: len(images)] for _ in moments]
    _write_grid(os.path.join(out, "strip.png"), shown, len(moments), texts)


def _write_grid(path, images, columns, texts):
    images = images if images.dtype == np.uint8 else pictures.to_uint8(images)
    write_aside(path, pictures.png(pictures.grid(images, columns, texts)))


def make(samples: "Samples", out: str, single: bool, strip: bool = False) -> None:
    """Makes the samples in the folder `out`, or those that are missing. Every host calls it.

    The caller holds the folder (runtime.files.hold). single: also write single pictures. strip: also write strip.png,
    for which the first batch is sampled once more. Raises UserError, OSError.
    """
    num, npz = len(samples.labels), os.path.join(out, "samples.npz")
    key = "latents" if samples.model.latent else "arr_0"
    # Only the first process writes, and decides where to resume. All make the same images.
    main_process = jax.process_index() == 0
    parts = _unfinished_parts(samples, out, npz, key) if main_process else None
    no_strip = not os.path.exists(os.path.join(out, "strip.png"))
    finished, done, no_strip = hosts.share((parts is None, parts.done if parts else 0, no_strip))[0]
    if not finished:
        if done:
            say(f"resuming from image {done} of {num}")
        start, waited = time.perf_counter(), samples.model.waited
        for images in samples.batches(done):
            if parts:
                parts.append(images)
        seconds = time.perf_counter() - start
        share = (samples.model.waited - waited) / seconds
        say(f"sampled in {duration(seconds)}; the devices waited for the host for {share:.1%} of it, at most")
    moments = samples.moments(STRIP_IMAGES, STRIP_MOMENTS) if strip and (no_strip or not finished) else None
    if parts:
        write_pictures(out, map(np.load, parts.files), samples, single)
        if moments:
            write_strip(out, moments, parts.first(len(moments[0])), samples.texts)
        parts.write_npz(npz, key)
        write_manifest(os.path.join(out, "manifest.json"), samples.manifest | {SHA256: sha256_of(npz)})
        parts.remove()
    elif main_process:
        if single or moments or not os.path.exists(os.path.join(out, "grid.png")):
            with np.load(npz) as file:
                images = file[key]
            write_pictures(out, [images], samples, single)
            if moments:
                write_strip(out, moments, images[: len(moments[0])], samples.texts)
        # A command that was killed just before its end leaves its parts.
        shutil.rmtree(os.path.join(out, "parts"), ignore_errors=True)
    what = "latents" if samples.model.latent else "images"
    say(f"{num} {what}: {npz} and grid.png" + " and png/" * single + " and strip.png" * strip)


def _unfinished_parts(samples, out, npz, key):
    """The Parts to resume from, or None if samples.npz is finished. For the first process only."""
    num, manifest, manifest_path = len(samples.labels), samples.manifest, os.path.join(out, "manifest.json")
    shape, dtype = (num, *samples.model.shape), np.dtype(np.float32 if samples.model.latent else np.uint8)
    known, digest = same_manifest(manifest_path, manifest)
    whole = known and is_whole(npz, key, shape, dtype, digest)
    # A command may be killed after samples.npz is written, and before the manifest has its digest.
    if whole and (digest is not None or not os.path.isdir(os.path.join(out, "parts"))):
        return None
    if os.path.exists(npz) and not whole:
        set_aside(out, npz, "is not what was written" if known else "is of unknown origin, there being no manifest")
    parts = Parts(out, json.dumps(manifest), shape, dtype)
    files.check_room(out, (2 * num - parts.done) * math.prod(shape[1:]) * dtype.itemsize, f"--num={num}")
    write_manifest(manifest_path, manifest)
    return parts
