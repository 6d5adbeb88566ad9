"""The latent cache: a folder of the VAE's posteriors of every picture of a data set and of its mirror image.

    manifest.json                               how it was made, and each shard's count, bytes and sha256
    latents-00000-of-00626.array_record, ...    in the order of the data set, `shard_size` pictures each

A shard holds two records an example, 2i the picture's and 2i + 1 its mirror image's, so that only the one that is
wanted is read: (h, w, 2C) [mean, standard deviation], unscaled, then the label, an int32, then the checksum of all
that, a uint64 (see `checksums`); little-endian. Any reader of ArrayRecord reads them. They are not compressed: it would
save 6 %, and all being of one length, each is then found by arithmetic and read by one system call into its row of the
batch. Nothing in the folder says when, where or on how many devices it was made. While it is being made, it also holds
settings.json, and a .json beside each whole shard. In preview.png, which is for people, are some pictures and what the
VAE makes of their latents.
"""

import functools
import hashlib
import json
import math
import os
import threading

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dit_jax.runtime.arrays import aligned_empty
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import check_file, naming, reading, write_aside
from dit_jax.runtime.process import allow_open_files

FORMAT = 3
TAIL = np.dtype([("label", "<i4"), ("checksum", "<u8")])  # of a record
MANIFEST, SETTINGS = "manifest.json", "settings.json"
DTYPES = ("float16", "float32")


def shard_name(index, num_shards):
    return f"latents-{index:05d}-of-{num_shards:05d}.array_record"


def to_bytes(fields):
    """JSON, the same for the same fields whatever their order."""
    return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def seal(fields):
    """The fields of a manifest and, as `sha256`, the checksum of them all."""
    return fields | {"sha256": hashlib.sha256(to_bytes(fields)).hexdigest()}


def read_manifest(path):
    """The manifest of the cache in the folder `path`. Raises UserError naming the file where there is none, where a
    byte of it has changed, or where it is of another version."""
    file = os.path.join(path, MANIFEST)
    if not os.path.exists(file):
        raise UserError(f"{file}: not there: either {path} is no latent cache, or its making was not finished (the same "
                        "encode command goes on)")
    with reading(file, "a manifest", "is damaged ({reason}): take it from a copy, or remove it and encode everything again"):
        with open(file, "rb") as f:
            data = f.read(2**26)  # of a million pictures it takes a hundredth
        manifest = json.loads(data)
        if to_bytes(seal({key: value for key, value in manifest.items() if key != "sha256"})) != data:
            raise UserError("it does not match its own checksum")
        if manifest["format"] != FORMAT:
            raise UserError(f"{file}: format {repr(manifest['format'])[:20]}, and this program reads format {FORMAT}: "
                            "encode anew, into another folder")
        manifest.setdefault("skipped", [])
        _check_fields(manifest)
    return manifest


def _check_fields(m):
    """Raises nearly anything where a field is not what encode writes, whatever the checksum says."""
    def count(v):
        return type(v) is int and 0 <= v < 2**48

    def text(v):
        return type(v) is str and v.isprintable()

    def is_shard(i, shard):
        return (shard["file"] == shard_name(i, len(shards)) and text(shard["sha256"]) and count(shard["count"])
                and count(shard["bytes"]) and shard["bytes"] >= 2 * shard["count"] * record_length(m["shape"], m["dtype"]))

    shards, names, vae = m["shards"], m["class_names"], m["vae"]
    for field, good in (
            ("dtype", m["dtype"] in DTYPES), ("shape", len(m["shape"]) == 3 and all(count(n) and n for n in m["shape"])),
            ("shards", all(is_shard(i, shard) for i, shard in enumerate(shards))),
            ("count", count(m["count"]) and m["count"] == sum(shard["count"] for shard in shards) > 0),
            ("size", count(m["size"])), ("num_classes", count(m["num_classes"])),
            ("class_names", names is None or isinstance(names, list) and all(map(text, names))),
            ("vae", type(vae["scale"]) in (int, float) and 0 < float(vae["scale"]) < math.inf and text(vae["encoder"])
             and all(text(value) for key, value in vae.items() if key != "scale")),
            ("skipped", all(count(s["index"]) and text(s["name"]) and text(s["reason"]) for s in m["skipped"]))):
        if not good:
            raise UserError(f"{field} is not what a cache can have")


def record_length(shape, dtype):
    """Bytes of a record: two of each number of a latent of `shape`, the label, the checksum."""
    return 2 * math.prod(shape) * np.dtype(dtype).itemsize + TAIL.itemsize


@functools.lru_cache(maxsize=4)
def _multipliers(count):
    return np.random.Philox(key=FORMAT).random_raw(count) | np.uint64(1)


def checksums(x, labels):
    """Of posteriors x (n, bytes) uint8 and labels (n,) int32 -> (n,) uint64: a fixed random number, and all words of 4
    bytes, each times its own odd random number, added modulo 2**64.

    One word that differs always shows, being multiplied by an odd number; of all else that may differ, about one case
    in 2**32 at most goes unseen. One call of NumPy for a batch costs half of a CRC-32 a record, and needs no package.
    """
    words = x.view("<u4")
    m = _multipliers(2 + words.shape[1])
    return m[0] + m[1] * labels.astype("<i4").view("<u4") + np.einsum("ij,j->i", words, m[2:])


def sizes(path):
    """{file: bytes} of the folder."""
    with os.scandir(path) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def size_problem(entry, there):
    """What is wrong with a shard of the manifest by the sizes that are there, or None."""
    size = there.get(entry["file"])
    if size is None:
        return "is missing"
    if size != entry["bytes"]:
        return f"has {size} bytes, not {entry['bytes']}: it is cut short or not the file that was written"
    return None


def sha256(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class ShardWriter:
    """Writes one shard aside; close() gives it its name once it is whole and on the disk."""

    def __init__(self, folder, name, dtype):
        self.path, self.name, self.dtype, self.count = os.path.join(folder, name), name, np.dtype(dtype), 0
        with naming(self.path):
            check_file(f"{self.path}.part")
            self.writer = ArrayRecordWriter(f"{self.path}.part", "group_size:1,uncompressed")

    def add(self, posteriors, labels):
        """posteriors (n, 2, h, w, 2C), of the pictures and of their mirror images; labels (n,). Raises OSError."""
        x = np.ascontiguousarray(posteriors, self.dtype.newbyteorder("<"))
        x = x.reshape(2 * len(x), -1).view(np.uint8)
        tails = np.empty(len(x), TAIL)
        tails["label"] = np.repeat(labels, 2)
        tails["checksum"] = checksums(x, tails["label"])
        with naming(self.path):
            for latent, tail in zip(x, tails):
                self.writer.write(latent.tobytes() + tail.tobytes())
        self.length, self.count = x.shape[1] + TAIL.itemsize, self.count + len(labels)

    def close(self):
        """The shard's entry in the manifest. Raises OSError where it could not be written."""
        with naming(self.path):
            self.writer.close()
        with open(f"{self.path}.part", "rb+") as f:
            os.fsync(f.fileno())
            if self.count and _read([f.fileno()], [2 * self.count - 1], self.length)[2]:
                raise RuntimeError(f"{self.path}: array_record places records elsewhere than it used to; take the "
                                   "version that setup.py asks for")
        entry = {"file": self.name, "count": self.count, "bytes": os.path.getsize(f"{self.path}.part"),
                 "sha256": sha256(f"{self.path}.part")}
        os.replace(f"{self.path}.part", self.path)
        return entry


# Of Riegeli, the format below ArrayRecord: what of a block of 64 KiB is not its header, and the header's bytes.
_BLOCK, _HEADER = 65512, 24
_SKIPPED = memoryview(bytearray(_HEADER))


def _places(records, length):
    """Where these records (n,) begin in an uncompressed ArrayRecord file with one record a chunk and all records of
    `length` bytes -> (n,) positions, headers of blocks not counted."""
    header = 40  # of the file's signature and of every chunk
    sizes = 2 + -(-length.bit_length() // 7)  # kind of compression, length of the lengths, the record's as a varint
    return header + (header + sizes) * (records + 1) + length * records


_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # only what is in memory; macOS lacks it, and reads all at the first attempt
_IN_MEMORY = threading.Lock()  # threads that take turns at many short calls lose more by that than they gain


def _read(fds, records, length):
    """Records (n,) of the shards open as the descriptors fds (n,) -> their posteriors (n, length - 12) uint8 and labels
    (n,) int32, and the rows of them that are not as they were written. Raises OSError."""
    n, width = len(records), length - TAIL.itemsize
    x, tails = aligned_empty((n, width), np.uint8), np.empty(n, TAIL)
    places = _places(np.asarray(records, np.int64), length)
    blocks = places // _BLOCK
    firsts, rooms = (places + _HEADER * (blocks + 1)).tolist(), (_BLOCK * (blocks + 1) - places).tolist()
    spans = (length + _HEADER * ((places + length - 1) // _BLOCK - blocks)).tolist()
    rows, ends, slow = memoryview(x.reshape(-1)), memoryview(tails.view(np.uint8)), []
    with _IN_MEMORY:
        for i, (fd, first, room, span) in enumerate(zip(fds, firsts, rooms, spans)):
            parts = [rows[i * width: (i + 1) * width], ends[i * TAIL.itemsize: (i + 1) * TAIL.itemsize]]
            if room < length:
                parts = _around_headers(parts, room)
            if slow or not _at_once(fd, parts, first, span):  # after one that is not in memory, no other is tried
                slow.append((i, fd, first, parts))
                if hasattr(os, "posix_fadvise"):  # a disk asked for many at once has them sooner; macOS lacks it
                    os.posix_fadvise(fd, first, span, os.POSIX_FADV_WILLNEED)
    bad = {i for i, fd, first, parts in slow if not _fill(fd, parts, first)}
    labels = tails["label"].astype(np.int32)
    return x, labels, sorted(bad.union(np.flatnonzero(checksums(x, labels) != tails["checksum"]).tolist()))


def _at_once(fd, parts, position, span):
    """Reads `span` bytes of a file into these buffers, if no disk is needed for it -> whether it did."""
    try:
        return os.preadv(fd, parts, position, _NOWAIT) == span
    except OSError:  # not in memory, or a file system that cannot tell
        return False


def _around_headers(parts, room):
    """These buffers in pieces, with something to skip a block's header by after `room` bytes and after each block."""
    pieces = []
    for part in parts:
        while len(part) > room:
            pieces += [part[:room], _SKIPPED]
            part, room = part[room:], _BLOCK
        pieces.append(part)
        room -= len(part)
    return pieces


def _fill(fd, parts, position):
    """Reads a file from `position` on into these buffers -> whether it holds so much. Raises OSError."""
    while parts:
        count = os.preadv(fd, parts, position)  # may be less than was asked for: network file systems do so
        if not count:
            return False
        position += count
        while parts and count >= len(parts[0]):
            count -= len(parts.pop(0))
        if count:
            parts[0] = parts[0][count:]
    return True


class LatentCache:
    """The cache in the folder `path`, as a source to train on.

    Attributes: manifest; vae (its identity) and scale, by which a latent is multiplied; size, of the pictures; shape
    (h, w, C) and dtype of the latents; class_names (or None), num_classes; identity; can_flip. Opening looks whether
    the manifest and all shards are there, of their sizes; check_shard looks at the bytes. Raises UserError naming the
    file.
    """

    can_flip = True

    def __init__(self, path):
        self.path, self.manifest = path, read_manifest(path)
        there = sizes(path)
        bad = [(entry["file"], what) for entry in self.manifest["shards"] if (what := size_problem(entry, there))]
        if bad:
            more = f" (and {len(bad) - 1} more like it)" if bad[1:] else ""
            raise UserError(f"{os.path.join(path, bad[0][0])}: {bad[0][1]}{more}; the encode command that made the "
                             "cache makes it again")
        m = self.manifest
        self.vae, self.scale, self.size = m["vae"], m["vae"]["scale"], m["size"]
        self.shape, self.dtype = tuple(m["shape"]), np.dtype(m["dtype"]).newbyteorder("<")
        self.class_names, self.num_classes = m["class_names"], m["num_classes"]
        self.identity = f"latents:{m['count']}:{m['sha256'][:16]}"
        self._starts = np.concatenate([[0], np.cumsum([entry["count"] for entry in m["shards"]])]).astype(np.int64)
        self._length = record_length(self.shape, self.dtype)
        self._files, self._lock = {}, threading.Lock()
        allow_open_files(len(m["shards"]))

    def __len__(self):
        return self.manifest["count"]

    def examples(self, indices, flips):
        """{"x": (n, h, w, 2C) [mean, std] as stored, "y": (n,) int32} of these examples, or of their mirror images.
        Raises UserError naming the shard and the examples that cannot be read."""
        indices, flips = np.asarray(indices, np.int64), np.asarray(flips, bool)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"examples {indices.min()} to {indices.max()} of {len(self)} in {self.path}")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        records = 2 * (indices - self._starts[shards]) + flips
        try:
            x, labels, bad = _read([self._open(shard) for shard in shards.tolist()], records, self._length)
        except OSError as e:
            raise UserError(f"{e.filename or self.path}: cannot be read ({e.strerror})") from None
        if bad:
            shard = shards[bad[0]]
            which = ", ".join(str(indices[i]) for i in bad if shards[i] == shard)
            raise UserError(f"{self._file(shard)}: is damaged: example {which} is not as it was written; look "
                             "for more with encode --verify")
        h, w, channels = self.shape
        return {"x": x.view(self.dtype).reshape(-1, h, w, 2 * channels), "y": labels}

    def _file(self, shard):
        return os.path.join(self.path, self.manifest["shards"][shard]["file"])

    def _open(self, shard):
        if shard not in self._files:
            with self._lock:
                if shard not in self._files:
                    self._files[shard] = open(self._file(shard), "rb", buffering=0)
        return self._files[shard].fileno()


def check_shard(path, manifest, index, there):
    """What is wrong with a shard, every byte of it read, or None. there: sizes(path)."""
    entry = manifest["shards"][index]
    file = os.path.join(path, entry["file"])
    try:
        if problem := size_problem(entry, there):
            return problem
        if sha256(file) == entry["sha256"]:
            return None
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    start = sum(other["count"] for other in manifest["shards"][:index])
    length, bad = record_length(manifest["shape"], manifest["dtype"]), set()
    try:
        with open(file, "rb") as f:
            for record in range(2 * entry["count"]):
                if _read([f.fileno()], [record], length)[2]:
                    bad.add(start + record // 2)
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    bad = sorted(bad)
    if not bad:
        return "is damaged: its checksum is another, though every example is as it was written"
    if len(bad) == entry["count"]:
        return f"is damaged: none of its examples ({bad[0]} to {bad[-1]}) is as it was written"
    return (f"is damaged: {len(bad)} of its {entry['count']} examples are not as they were written: "
            f"{', '.join(map(str, bad[:10]))}{', ...' if bad[10:] else ''}")


def write_manifest(path, fields):
    write_aside(os.path.join(path, MANIFEST), to_bytes(seal(fields)))
