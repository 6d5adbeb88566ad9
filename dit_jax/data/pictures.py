"""Pictures decoded and cropped from raw records."""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8

from dit_jax.data.decode import BadImage, center_crop, decode
from dit_jax.data.records import Folder, Records, Tfds
from dit_jax.runtime.arrays import aligned_empty
from dit_jax.runtime.errors import UserError


class Pictures:
    """A source (see data/sources.py) of pictures, upright and centre-cropped to size x size; x is uint8.

    A broken picture is replaced by the next readable one (index + 1, ...), so that the replacement depends on the index
    alone and all hosts and runs agree. It is recorded in `skipped` {name: reason} and reported once on stderr. More
    than `max_skipped` broken pictures raise UserError.
    """

    can_flip = True

    def __init__(self, raw: Records, size: int, max_skipped: int = 100):
        self.raw, self.size, self.max_skipped = raw, size, max_skipped
        self.class_names, self.num_classes = raw.class_names, raw.num_classes
        self.identity = f"{raw.identity}:{size}px"
        self.skipped: dict[str, str] = {}
        self._lock = threading.Lock()
        # With more threads each waits longer for the interpreter's lock.
        self._pool = ThreadPoolExecutor((os.cpu_count() or 1) + 1)

    def __len__(self) -> int:
        return len(self.raw)

    def read(self, index: int) -> tuple[UInt8[np.ndarray, "size size 3"], int]:
        """Returns (picture, label). Raises BadImage naming the picture, or UserError if its file cannot be read."""
        name, data, label = self.raw[index]
        try:
            return center_crop(decode(data), self.size), label
        except BadImage as e:
            raise BadImage(e.reason, name) from None

    def _skip(self, error: BadImage) -> None:
        with self._lock:
            if error.name in self.skipped:
                return
            self.skipped[error.name] = error.reason
            if len(self.skipped) > self.max_skipped:
                raise UserError(
                    f"{len(self.skipped)} pictures cannot be used, more than max_skipped="
                    f"{self.max_skipped}; the last: {error}"
                )
            print(f"skipped {len(self.skipped)} of at most {self.max_skipped}: {error}", file=sys.stderr, flush=True)

    def _read_or_next(self, index: int) -> tuple[UInt8[np.ndarray, "size size 3"], int]:
        """Returns the picture and label of the first readable index from `index` on."""
        for i in range(index, index + len(self)):
            try:
                return self.read(i % len(self))
            except BadImage as e:
                self._skip(e)
        raise UserError(f"none of the {len(self)} pictures can be used, e.g. {next(iter(self.skipped.items()))}")

    def examples(self, indices: Int[np.ndarray, " n"], flips: Bool[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Returns {"x": uint8 (n, size, size, 3), "y": int32 (n,)}, decoded in threads. flips: mirror left to right."""
        x, y = aligned_empty((len(indices), self.size, self.size, 3), np.uint8), np.empty(len(indices), np.int32)

        def read(row, index, flip):
            image, y[row] = self._read_or_next(int(index))
            x[row] = image[:, ::-1] if flip else image

        for _ in self._pool.map(read, range(len(x)), indices, flips):
            pass
        return {"x": x, "y": y}

    def read_usable(self, indices: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "m size size 3"]:
        """Returns the pictures at these indices without the broken ones, which are recorded in `skipped`."""

        def read(index):
            try:
                return self.read(index)[0]
            except BadImage as e:
                self._skip(e)

        usable = [x for x in self._pool.map(read, [int(i) for i in indices]) if x is not None]
        return np.stack(usable) if usable else np.empty((0, self.size, self.size, 3), np.uint8)


def open_pictures(source: str, path: str | None, name: str | None, split: str, size: int, max_skipped: int) -> Pictures:
    """Returns the pictures that the flags of cli.define_source name. Raises UserError naming the flag."""
    if not path:
        raise UserError("--path is missing: name the folder of class folders, or the data_dir of tensorflow-datasets")
    if source == "folder":
        return Pictures(Folder(path), size, max_skipped)
    if not name:
        raise UserError("--name is missing: name the data set, e.g. --name=imagenet2012")
    return Pictures(Tfds(name, split, path), size, max_skipped)


def shares(source: Pictures, size: int) -> Iterator[UInt8[np.ndarray, "n s s 3"]]:
    """Yields this host's share of every `size` pictures of the source, without the broken ones."""
    for start in range(0, len(source), size):
        indices = np.array_split(np.arange(start, min(start + size, len(source))), jax.process_count())
        yield source.read_usable(indices[jax.process_index()])


def evenly_spread(source: Pictures, count: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Returns `count` pictures, evenly spread over the source. Other pictures replace the broken ones."""
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    waiting = np.concatenate([chosen, np.setdiff1d(np.arange(len(source)), chosen)])
    images = []
    while len(waiting) and count:
        images.append(source.read_usable(waiting[:count]))
        waiting, count = waiting[count:], count - len(images[-1])
    return np.concatenate(images)
