"""What sampling writes into a folder: samples.npz, resumable by its parts, with a manifest, a grid and single pictures."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import zipfile

import jax
import numpy as np

from dit_jax.runtime import files, hosts, images as pictures
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import say

GRID_IMAGES = 100


class Parts:
    """The images made so far, in OUT/parts, consecutive from 0. A file START-COUNT-HASH.npy says by its name which images it
    holds, and by a hash of these two, of the settings and of its bytes, that it is what was written. What is not is set
    aside, and said.

    out: the folder; settings: text that says all that the images depend on; shape (N, H, W, C) and dtype of all of them.
    Attributes: files, done (images).
    """

    def __init__(self, out, settings, shape, dtype):
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
        """Whether the file is the next part."""
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

    def append(self, images):
        data = io.BytesIO()
        np.save(data, images)
        path = self._path(len(images), data.getvalue())
        write_aside(path, data.getvalue())
        self._add(path, len(images))

    def write_npz(self, path, key):
        """All parts as one array of an .npz, streamed: 50,000 pictures need not fit in memory."""
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        with files.writing(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array_header_1_0(f, header)
                for file in self.files:
                    f.write(np.ascontiguousarray(np.load(file)).tobytes())

    def remove(self):
        shutil.rmtree(self.folder)


def set_aside(out, path, why):
    """Moves a file to OUT/damaged, and says so."""
    damaged = os.path.join(out, "damaged")
    os.makedirs(damaged, exist_ok=True)
    os.replace(path, os.path.join(damaged, os.path.basename(path)))
    say(f"{path}: {why}: moved to {damaged}, and made again")


SHA256 = "samples_sha256"  # in a manifest: of samples.npz, once it is there


def write_manifest(path, manifest):
    write_aside(path, (json.dumps(manifest, indent=2) + "\n").encode())


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def same_manifest(path, manifest):
    """(whether `path` holds this manifest, the sha256 of the samples or None). UserError naming the settings where it holds
    another."""
    if not os.path.exists(path):
        return False, None
    there = files.read_json(path)
    if there is None:
        raise UserError(f"{path}: is damaged, so that nobody can tell how what is here was made; use another --out")
    digest = there.pop(SHA256, None)
    differ = [f"{key} ({there.get(key)!r} there, {manifest.get(key)!r} here)" for key in {**there, **manifest}
              if there.get(key) != manifest.get(key)]
    if differ:
        raise UserError(f"{path}: what is here was made with other settings: {', '.join(differ)}; use another --out")
    return True, digest


def is_whole(path, key, shape, dtype, digest):
    """Whether `path` is an .npz with this array under `key`, every byte as it was written. digest: its sha256, or None, which
    older manifests have."""
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


def write_single(out, start, images):
    for i, image in enumerate(images, start):
        write_aside(os.path.join(out, "png", f"{i:06d}.png"), pictures.png(image))


def write_pictures(out, arrays, labels, single):
    """grid.png of the first images, a column a class where there are a few, and with `single` each one."""
    first, start = [], 0
    for images in arrays:
        if single:
            write_single(out, start, images)
        if start < GRID_IMAGES:
            first.append(images)
        start += len(images)
    first = np.concatenate(first)[:GRID_IMAGES]
    classes = len(set(labels.tolist()))
    columns = min(classes if classes > 1 else math.isqrt(len(first)), 10)
    write_aside(os.path.join(out, "grid.png"), pictures.png(pictures.grid(
        first if first.dtype == np.uint8 else pictures.to_uint8(first), columns)))


def make(samples, out, single):
    """Makes the samples in the folder `out`, which is held, or what is left of them to be made. Every host calls it.

    samples: sampling.model.Samples. single: whether single pictures are written as well. Raises UserError, OSError.
    """
    labels, latent, manifest, num = samples.labels, samples.latent, samples.manifest, len(samples.labels)
    manifest_path, npz = os.path.join(out, "manifest.json"), os.path.join(out, "samples.npz")
    key = "latents" if latent else "arr_0"
    # The first process alone writes, and looks where to go on; all make the same images.
    main_process = jax.process_index() == 0
    finished, parts = False, None
    if main_process:
        known, digest = same_manifest(manifest_path, manifest)
        shape, dtype = (num, *samples.shape), np.float32 if latent else np.uint8
        whole = known and is_whole(npz, key, shape, dtype, digest)
        finished = whole and not (digest is None and os.path.isdir(os.path.join(out, "parts")))  # killed just before its end
        if os.path.exists(npz) and not whole:
            set_aside(out, npz, "is not what was written" if known else "is of unknown origin, there being no manifest")
    if main_process and not finished:
        parts = Parts(out, json.dumps(manifest), shape, dtype)
        files.check_room(out, (2 * num - parts.done) * math.prod(shape[1:]) * np.dtype(dtype).itemsize, f"--num={num}")
        write_manifest(manifest_path, manifest)
    finished, done = hosts.share((finished, parts.done if parts else 0))[0]
    if not finished:
        if done:
            say(f"goes on from image {done} of {num}")
        for images in samples.batches(done):
            if main_process:
                parts.append(images)
        if main_process:
            write_pictures(out, map(np.load, parts.files), labels, single)
            parts.write_npz(npz, key)
            write_manifest(manifest_path, manifest | {SHA256: sha256_of(npz)})
            parts.remove()
    elif main_process:
        if single or not os.path.exists(os.path.join(out, "grid.png")):
            with np.load(npz) as file:
                write_pictures(out, [file[key]], labels, single)
        shutil.rmtree(os.path.join(out, "parts"), ignore_errors=True)  # of a command that was killed just before its end
    say(f"{num} {'latents' if latent else 'images'}: {npz} and grid.png" + (" and png/" if single else ""))
