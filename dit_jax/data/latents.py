"""The latent cache: a folder of the VAE's posteriors of every picture of a data set and of its mirror image.

    manifest.json                               how it was made, and each shard's count, bytes and sha256
    latents-00000-of-00626.array_record, ...    in the order of the data set, `shard_size` pictures each

A shard holds two records an example, 2i the picture's and 2i + 1 its mirror image's, so that only the one that is
wanted is read: (h, w, 2C) [mean, standard deviation], unscaled, then the label, an int32; little-endian. They are not
compressed: it would save 6 % and halve the rate of reading. Nothing in the folder says when, where or on how many
devices it was made. While it is being made, it also holds settings.json, and a .json beside each whole shard. In
preview.png, which is for people, are some pictures and what the VAE makes of their latents.
"""

import contextlib
import hashlib
import json
import os
import resource
import threading

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dit_jax.pictures import write_aside

FORMAT = 1
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
    """The manifest of the cache in the folder `path`. Raises ValueError naming the file where there is none, where a
    byte of it has changed, or where it is of another version."""
    file = os.path.join(path, MANIFEST)
    try:
        with open(file, "rb") as f:
            data = f.read()
    except FileNotFoundError:
        raise ValueError(f"{file}: not there: either {path} is no latent cache, or its making was not finished (the "
                         "same encode command goes on)") from None
    except OSError as e:
        raise ValueError(f"{file}: cannot be read ({e.strerror})") from None
    try:
        manifest = json.loads(data)
        fields = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = to_bytes(seal(fields)) == data
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: is damaged (it does not match its own checksum): take it from a copy, or remove it "
                         "and encode everything again")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{file}: format {manifest['format']}, and this program reads format {FORMAT}")
    return manifest


def sizes(path):
    """{file: bytes} of the folder."""
    with os.scandir(path) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def misfit(entry, there):
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


@contextlib.contextmanager
def _os_errors():
    """What ArrayRecord calls a RuntimeError while it writes is a full disk and the like."""
    try:
        yield
    except RuntimeError as e:
        raise OSError(str(e)) from None


class ShardWriter:
    """Writes one shard aside; close() gives it its name once it is whole and on the disk."""

    def __init__(self, folder, name, dtype):
        self.path, self.name, self.dtype, self.count = os.path.join(folder, name), name, np.dtype(dtype), 0
        self.writer = ArrayRecordWriter(f"{self.path}.part", "group_size:1,uncompressed")

    def add(self, posteriors, labels):
        """posteriors (n, 2, h, w, 2C), of the pictures and of their mirror images; labels (n,). Raises OSError."""
        dtype = self.dtype.newbyteorder("<")
        with _os_errors():
            for both, label in zip(np.asarray(posteriors, dtype), np.asarray(labels, "<i4"), strict=True):
                for posterior in both:
                    self.writer.write(posterior.tobytes() + label.tobytes())
        self.count += len(labels)

    def close(self):
        """The shard's entry in the manifest. Raises OSError where it could not be written."""
        with _os_errors():
            self.writer.close()
        with open(f"{self.path}.part", "rb+") as f:
            os.fsync(f.fileno())
        entry = {"file": self.name, "count": self.count, "bytes": os.path.getsize(f"{self.path}.part"),
                 "sha256": sha256(f"{self.path}.part")}
        os.replace(f"{self.path}.part", self.path)
        return entry


def _open(file):
    return ArrayRecordReader(file, "readahead_buffer_size:0", file_reader_buffer_size=32768)


def _unreadable(file, records):
    """{record: why} of those that cannot be read, each tried with a reader of its own."""
    bad = {}
    for record in records:
        try:
            _open(file).read([int(record)])
        except Exception as e:
            bad[record] = str(e).split(" (computed")[0]
    return bad


class LatentCache:
    """The cache in the folder `path`, as a source to train on.

    Attributes: manifest; vae (its identity) and scale, by which a latent is multiplied; size, of the pictures; shape
    (h, w, C) and dtype of the latents; class_names (or None), num_classes; identity; can_flip. Opening looks whether
    the manifest and all shards are there, of their sizes; check_shard looks at the bytes. Raises ValueError naming the
    file.
    """

    can_flip = True

    def __init__(self, path):
        self.path, self.manifest = path, read_manifest(path)
        there = sizes(path)
        bad = [(entry["file"], what) for entry in self.manifest["shards"] if (what := misfit(entry, there))]
        if bad:
            more = f" (and {len(bad) - 1} more like it)" if bad[1:] else ""
            raise ValueError(f"{os.path.join(path, bad[0][0])}: {bad[0][1]}{more}; the encode command that made the "
                             "cache makes it again")
        m = self.manifest
        self.vae, self.scale, self.size = m["vae"], m["vae"]["scale"], m["size"]
        self.shape, self.dtype = tuple(m["shape"]), np.dtype(m["dtype"]).newbyteorder("<")
        self.class_names, self.num_classes = m["class_names"], m["num_classes"]
        self.identity = f"latents:{m['count']}:{m['sha256'][:16]}"
        self._starts = np.concatenate([[0], np.cumsum([entry["count"] for entry in m["shards"]])]).astype(np.int64)
        self._values = 2 * int(np.prod(self.shape))
        self._readers, self._lock = {}, threading.Lock()
        allow_open_files(len(m["shards"]))

    def __len__(self):
        return self.manifest["count"]

    def examples(self, indices, flips):
        """{"x": (n, h, w, 2C) [mean, std] as stored, "y": (n,) int32} of these examples, or of their mirror images.
        Raises ValueError naming the shard and the examples that cannot be read."""
        indices, flips = np.asarray(indices, np.int64), np.asarray(flips, bool)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"examples {indices.min()} to {indices.max()} of {len(self)} in {self.path}")
        x, y = np.empty((len(indices), self._values), self.dtype), np.empty(len(indices), np.int32)
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        records = 2 * (indices - self._starts[shards]) + flips
        order = np.argsort(shards, kind="stable")
        by_shard = np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(order) else []

        for rows in by_shard:
            for row, data in zip(rows, self._read(shards[rows[0]], records[rows].tolist())):
                x[row] = np.frombuffer(data, self.dtype, self._values)
                y[row] = int.from_bytes(data[-4:], "little", signed=True)
        h, w, channels = self.shape
        return {"x": x.reshape(-1, h, w, 2 * channels), "y": y}

    def _reader(self, shard):
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = _open(os.path.join(self.path, self.manifest["shards"][shard]["file"]))
            return self._readers[shard]

    def _read(self, shard, records):
        try:
            # One by one: a list of records is read through a pool of threads, at three times the processor's time.
            reader = self._reader(shard)
            found = [reader.read(record, record + 1)[0] for record in records]
            if all(len(data) == self._values * self.dtype.itemsize + 4 for data in found):
                return found
            why = {"": "a record of another length"}
        except Exception as e:
            why = {"": str(e)}
        file = os.path.join(self.path, self.manifest["shards"][shard]["file"])
        bad = _unreadable(file, records)
        which = ", ".join(str(self._starts[shard] + record // 2) for record in bad)
        raise ValueError(f"{file}: is damaged: example {which or 'unknown'} cannot be read "
                         f"({next(iter((bad or why).values()))}); look for more with encode --verify")


def allow_open_files(count):
    """Room for `count` open shards, which readers keep open; often no more than 1024 are allowed where nobody asks.
    Raises ValueError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ValueError(f"{count} shards are to be kept open, and this system lets a process open {hard} files: raise "
                             f"the limit (ulimit -Hn) to {wanted}, or make larger shards")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_shard(path, manifest, index, there):
    """What is wrong with a shard, every byte of it read, or None. there: sizes(path)."""
    entry = manifest["shards"][index]
    file = os.path.join(path, entry["file"])
    try:
        if problem := misfit(entry, there):
            return problem
        if sha256(file) == entry["sha256"]:
            return None
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    start = sum(other["count"] for other in manifest["shards"][:index])
    bad = sorted({start + record // 2 for record in _unreadable(file, range(2 * entry["count"]))})
    if not bad:
        return "is damaged: its checksum is another, though every example can be read"
    if len(bad) == entry["count"]:
        return f"is damaged: none of its examples ({bad[0]} to {bad[-1]}) can be read"
    return (f"is damaged: {len(bad)} of its {entry['count']} examples cannot be read: "
            f"{', '.join(map(str, bad[:10]))}{', ...' if bad[10:] else ''}")


def write_manifest(path, fields):
    write_aside(os.path.join(path, MANIFEST), to_bytes(seal(fields)))
