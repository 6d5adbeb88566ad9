"""The latent cache: a directory with the VAE's posteriors of every picture of a data set and of its mirror image.

    manifest.json                               how the cache was made; the count, bytes and sha256 of each shard
    latents-00000-of-00626.array_record, ...    the examples in the order of the data set, `shard_size` in each shard

Example i of a shard has two records, so that a batch reads only the one it needs: record 2i is the picture's, record
2i + 1 the mirror image's. A record is little-endian:

    posterior   (h, w, 2C), float16 or float32: mean and standard deviation, not scaled
    label       int32
    checksum    uint64, over posterior and label (see `checksums`)

Shards are ArrayRecord files. Each record is a chunk of its own, so that one example is read without its neighbours.
Records are not compressed: compression saves only 6 %. The bytes of the directory do not depend on the date, the host
or the number of devices. During encoding the directory also holds settings.json, and a .json file for each finished
shard. preview.png shows some pictures, and below them what the VAE decodes from their latents.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Bool, Float, Int, Int32, Int64, UInt8, UInt64

from dit_jax.runtime.arrays import aligned_empty
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import check_file, naming, reading, write_aside
from dit_jax.runtime.process import allow_open_files

FORMAT = 3
TAIL = np.dtype([("label", "<i4"), ("checksum", "<u8")])  # the end of a record
MANIFEST, SETTINGS = "manifest.json", "settings.json"
DTYPES = ("float16", "float32")


def shard_name(index: int, num_shards: int) -> str:
    return f"latents-{index:05d}-of-{num_shards:05d}.array_record"


def to_bytes(fields: dict[str, Any]) -> bytes:
    """Returns JSON that does not depend on the order of the fields."""
    return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def seal(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields with their checksum added as `sha256`."""
    return fields | {"sha256": hashlib.sha256(to_bytes(fields)).hexdigest()}


def read_manifest(path: str) -> dict[str, Any]:
    """Returns the manifest of the cache in directory `path`.

    Raises UserError naming the file if it is missing, if a byte of it has changed, or if it is of another format.
    """
    file = os.path.join(path, MANIFEST)
    if not os.path.exists(file):
        raise UserError(
            f"{file}: does not exist: either {path} is no latent cache, or encoding did not finish (run the same "
            "encode command to resume)"
        )
    advice = "is damaged ({reason}): take it from a copy, or remove it and encode everything again"
    with reading(file, "a manifest", advice):
        with open(file, "rb") as f:
            data = f.read(2**26)  # the manifest of a million pictures takes a hundredth of that
        manifest = json.loads(data)
        if to_bytes(seal({key: value for key, value in manifest.items() if key != "sha256"})) != data:
            raise ValueError("it does not match its own checksum")
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{file}: format {repr(manifest['format'])[:20]}, and this program reads format {FORMAT}: encode anew, "
                "into another folder"
            )
        manifest.setdefault("skipped", [])
        _check_fields(manifest)
    return manifest


def _check_fields(m: dict[str, Any]) -> None:
    """Checks that every field of a manifest is one that encode can write. Raises nearly any exception if one is not."""

    def count(v):
        return type(v) is int and 0 <= v < 2**48

    def text(v):
        return type(v) is str and v.isprintable()

    def is_shard(i, shard):
        if shard["file"] != shard_name(i, len(shards)) or not text(shard["sha256"]):
            return False
        if not count(shard["count"]) or not count(shard["bytes"]):
            return False
        return shard["bytes"] >= 2 * shard["count"] * record_length(m["shape"], m["dtype"])

    shards, names, vae = m["shards"], m["class_names"], m["vae"]
    good = {
        "dtype": m["dtype"] in DTYPES,
        "shape": len(m["shape"]) == 3 and all(count(n) and n for n in m["shape"]),
        "shards": all(is_shard(i, shard) for i, shard in enumerate(shards)),
        "count": count(m["count"]) and m["count"] == sum(shard["count"] for shard in shards) > 0,
        "size": count(m["size"]),
        "num_classes": count(m["num_classes"]),
        "class_names": names is None or (isinstance(names, list) and all(map(text, names))),
        "vae": all(text(value) for key, value in vae.items() if key != "scale") and text(vae["encoder"]),
        "vae.scale": type(vae["scale"]) in (int, float) and 0 < float(vae["scale"]) < math.inf,
        "skipped": all(count(s["index"]) and text(s["name"]) and text(s["reason"]) for s in m["skipped"]),
    }
    for field, is_good in good.items():
        if not is_good:
            raise ValueError(f"{field} is not what a cache can have")


def write_manifest(path: str, fields: dict[str, Any]) -> None:
    write_aside(os.path.join(path, MANIFEST), to_bytes(seal(fields)))


def record_length(shape: Sequence[int], dtype: str | np.dtype) -> int:
    """Returns the bytes of a record: mean and standard deviation of a latent of `shape`, label, checksum."""
    return 2 * math.prod(shape) * np.dtype(dtype).itemsize + TAIL.itemsize


@functools.lru_cache(maxsize=4)
def _multipliers(count: int) -> UInt64[np.ndarray, " count"]:
    return np.random.Philox(key=FORMAT).random_raw(count) | np.uint64(1)


def checksums(x: UInt8[np.ndarray, "n bytes"], labels: Int32[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Returns a checksum for each posterior and its label.

    A checksum is the sum, modulo 2**64, of a constant and of all words of 4 bytes, each multiplied by an odd random
    number of its own. A change in a single word always changes the sum, since its factor is odd. Any other change goes
    unseen in at most about one case of 2**32. A record of zeros has no valid checksum, since the constant is not zero.
    One NumPy call for a batch takes half the time of a CRC-32 for each record, and needs no package.
    """
    words = x.view("<u4")
    m = _multipliers(2 + words.shape[1])
    return m[0] + m[1] * labels.astype("<i4").view("<u4") + np.einsum("ij,j->i", words, m[2:])


def sizes(path: str) -> dict[str, int]:
    """Returns {file: bytes} of a directory."""
    with os.scandir(path) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def size_problem(entry: dict[str, Any], there: dict[str, int]) -> str | None:
    """Returns what is wrong with a shard of the manifest according to `sizes`, or None."""
    size = there.get(entry["file"])
    if size is None:
        return "is missing"
    if size != entry["bytes"]:
        return f"has {size} bytes, not {entry['bytes']}: it is cut short or not the file that was written"
    return None


def sha256(file: str) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class ShardWriter:
    """Writes one shard to a .part file, which close() renames once it is complete and on the disk."""

    def __init__(self, folder: str, name: str, dtype: str):
        self.path, self.name, self.dtype, self.count = os.path.join(folder, name), name, np.dtype(dtype), 0
        with naming(self.path):
            check_file(f"{self.path}.part")
            self.writer = ArrayRecordWriter(f"{self.path}.part", "group_size:1,uncompressed")

    def add(self, posteriors: Float[np.ndarray, "n 2 h w c"], labels: Sequence[int] | Int[np.ndarray, " n"]) -> None:
        """Appends the posteriors of n pictures and of their mirror images. Raises OSError."""
        x = np.ascontiguousarray(posteriors, self.dtype.newbyteorder("<"))
        x = x.reshape(2 * len(x), -1).view(np.uint8)
        tails = np.empty(len(x), TAIL)
        tails["label"] = np.repeat(labels, 2)
        tails["checksum"] = checksums(x, tails["label"])
        with naming(self.path):
            for latent, tail in zip(x, tails):
                self.writer.write(latent.tobytes() + tail.tobytes())
        self.count += len(labels)

    def close(self) -> dict[str, Any]:
        """Returns the shard's entry for the manifest. Raises OSError if the shard could not be written."""
        part = f"{self.path}.part"
        with naming(self.path):
            self.writer.close()
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        entry = {"file": self.name, "count": self.count, "bytes": os.path.getsize(part), "sha256": sha256(part)}
        os.replace(part, self.path)
        return entry


def open_shards(folder: str, entries: Sequence[dict[str, Any]]) -> Any:
    """Returns the records of these shards as one sequence, which several threads may read at once.

    A shard is opened when one of its records is first read, and stays open as long as the sequence exists.
    """
    # Not imported at the top, because it defines command-line flags of its own.
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    def records_of(entry):
        count = 2 * entry["count"]
        file = os.path.join(folder, entry["file"])
        return SimpleNamespace(filename=file, skip=0, take=count, examples_in_shard=count)

    instructions: Any = [records_of(entry) for entry in entries]
    return ArrayRecordDataSource(instructions)


def read_records(shards: Any, keys: Sequence[int]) -> list[bytes]:
    """Returns the records of open_shards() at these keys; b"" for each record that cannot be read.

    ArrayRecord verifies a hash of every record it reads, and raises over the whole batch. The second attempt finds the
    records that are at fault.
    """
    try:
        return list(shards.__getitems__(keys))
    except (RuntimeError, ValueError):
        return [_read_record(shards, key) for key in keys]


def _read_record(shards, key: int) -> bytes:
    try:
        return shards[key]
    except (RuntimeError, ValueError):
        return b""


def unpack(
    records: Sequence[bytes], length: int
) -> tuple[UInt8[np.ndarray, "n bytes"], Int32[np.ndarray, " n"], Int64[np.ndarray, " k"]]:
    """Returns (posteriors, labels, rows that are not as they were written) of n records.

    A record must have `length` bytes and its own checksum. ArrayRecord's hash finds what has changed in the file; the
    checksum also covers what happens before a record is hashed and after it is verified.
    """
    n, width = len(records), length - TAIL.itemsize
    posteriors, tails = aligned_empty((n, width), np.uint8), np.empty(n, TAIL)
    for row, record in enumerate(records):
        if len(record) != length:
            record = bytes(length)  # fails the comparison below: zeros have no valid checksum
        posteriors[row] = np.frombuffer(record, np.uint8, width)
        tails[row] = np.frombuffer(record, TAIL, 1, width)[0]
    labels = tails["label"].astype(np.int32)
    return posteriors, labels, np.flatnonzero(checksums(posteriors, labels) != tails["checksum"])


class LatentCache:
    """A source (see data/sources.py) of the posteriors in a latent cache.

    x is (n, h, w, 2C) as stored: [mean, standard deviation], not scaled. `scale` multiplies the latents. `shape` is
    (h, w, C), and `size` the side of the pictures in pixels. `vae` is the identity of the VAE.

    The constructor compares the sizes of all shards with the manifest; check_shard() reads their bytes. Raises
    UserError naming the file.
    """

    can_flip = True

    def __init__(self, path: str):
        self.path, self.manifest = path, read_manifest(path)
        there, shards = sizes(path), self.manifest["shards"]
        problems = [(entry["file"], problem) for entry in shards if (problem := size_problem(entry, there))]
        if problems:
            file, problem = problems[0]
            more = f" (and {len(problems) - 1} more like it)" if problems[1:] else ""
            raise UserError(
                f"{os.path.join(path, file)}: {problem}{more}; the encode command that made the cache makes it again"
            )
        m = self.manifest
        self.vae, self.scale, self.size = m["vae"], m["vae"]["scale"], m["size"]
        self.shape, self.dtype = tuple(m["shape"]), np.dtype(m["dtype"]).newbyteorder("<")
        self.class_names, self.num_classes = m["class_names"], m["num_classes"]
        self.identity = f"latents:{m['count']}:{m['sha256'][:16]}"
        self._ends = np.cumsum([entry["count"] for entry in shards])
        self._length = record_length(self.shape, self.dtype)
        allow_open_files(len(shards))
        self._shards = open_shards(path, shards)

    def __len__(self) -> int:
        return self.manifest["count"]

    def examples(self, indices: Int[np.ndarray, " n"], flips: Bool[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Returns {"x": (n, h, w, 2C), "y": int32 (n,)}. flips: which examples are replaced by their mirror images.

        Threads may call it at once. Raises UserError naming the shard and the examples that cannot be read.
        """
        indices, flips = np.asarray(indices, np.int64), np.asarray(flips, bool)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"examples {indices.min()} to {indices.max()} of {len(self)} in {self.path}")
        records = read_records(self._shards, (2 * indices + flips).tolist())
        x, labels, bad = unpack(records, self._length)
        if bad.size:
            raise UserError(self._problem(indices[bad]))
        h, w, channels = self.shape
        return {"x": x.view(self.dtype).reshape(-1, h, w, 2 * channels), "y": labels}

    def _problem(self, indices: Int64[np.ndarray, " k"]) -> str:
        """Returns the error line about examples that could not be read: those in the shard of the first of them."""
        shards = np.searchsorted(self._ends, indices, side="right")
        entry = self.manifest["shards"][shards[0]]
        file = os.path.join(self.path, entry["file"])
        which = ", ".join(map(str, indices[shards == shards[0]]))
        try:
            whole = sha256(file) == entry["sha256"]
        except OSError as e:
            return f"{file}: cannot be read ({e.strerror})"
        if whole:
            return f"{file}: is whole, but example {which} could not be read: run the same command again"
        return f"{file}: is damaged: example {which} is not as it was written; look for more with encode --verify"


def check_shard(path: str, manifest: dict[str, Any], index: int, there: dict[str, int]) -> str | None:
    """Returns what is wrong with a shard, of which every byte is read, or None. there: sizes(path)."""
    entry = manifest["shards"][index]
    if problem := size_problem(entry, there):
        return problem
    try:
        if sha256(os.path.join(path, entry["file"])) == entry["sha256"]:
            return None
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    start = sum(other["count"] for other in manifest["shards"][:index])
    length, shard, bad = record_length(manifest["shape"], manifest["dtype"]), open_shards(path, [entry]), set()
    for i in range(entry["count"]):
        if unpack(read_records(shard, [2 * i, 2 * i + 1]), length)[2].size:
            bad.add(start + i)
    bad = sorted(bad)
    if not bad:
        return "is damaged: its checksum is another, though every example is as it was written"
    if len(bad) == entry["count"]:
        return f"is damaged: none of its examples ({bad[0]} to {bad[-1]}) can be read"
    return (
        f"is damaged: {len(bad)} of its {entry['count']} examples are not as they were written: "
        f"{', '.join(map(str, bad[:10]))}{', ...' if bad[10:] else ''}"
    )
