"""Pictures to train on: raw records decoded and cropped."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from dit_jax.data.decode import BadImage, center_crop, decode
from dit_jax.data.records import Folder, Tfds
from dit_jax.runtime.arrays import aligned_empty
from dit_jax.runtime.errors import UserError


class Pictures:
    """Training source: raw records decoded, upright, centre-cropped to size x size; x is uint8 (n, size, size, 3).

    A broken picture is replaced by the next readable one (index + 1, ...), kept in `skipped` {name: reason} and said
    once on stderr; more than `max_skipped` of them raise UserError. What stands for a broken one depends on the index
    alone, so that all hosts and runs agree.
    """

    can_flip = True

    def __init__(self, raw, size, max_skipped=100):
        self.raw, self.size, self.max_skipped = raw, size, max_skipped
        self.class_names, self.num_classes = raw.class_names, raw.num_classes
        self.identity = f"{raw.identity}:{size}px"
        self.skipped = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(os.cpu_count() + 1)  # of more, each waits longer for the interpreter's lock

    def __len__(self):
        return len(self.raw)

    def read(self, index):
        """-> (uint8 (size, size, 3), label). Raises BadImage("NAME: reason"), ValueError where a file is gone."""
        name, data, label = self.raw[index]
        try:
            return center_crop(decode(data), self.size), label
        except BadImage as e:
            raise BadImage(e.reason, name) from None

    def _skip(self, error):
        with self._lock:
            if error.name in self.skipped:
                return
            self.skipped[error.name] = error.reason
            if len(self.skipped) > self.max_skipped:
                raise UserError(f"{len(self.skipped)} pictures cannot be used, more than max_skipped="
                                 f"{self.max_skipped}; the last: {error}")
            print(f"skipped {len(self.skipped)} of at most {self.max_skipped}: {error}", file=sys.stderr, flush=True)

    def _readable(self, index):
        for i in range(index, index + len(self)):
            try:
                return self.read(i % len(self))
            except BadImage as e:
                self._skip(e)
        raise UserError(f"none of the {len(self)} pictures can be used, e.g. {next(iter(self.skipped.items()))}")

    def examples(self, indices, flips):
        """-> {"x": uint8 (n, size, size, 3), "y": int32 (n,)}, decoded in threads; flips mirror left to right."""
        x, y = aligned_empty((len(indices), self.size, self.size, 3), np.uint8), np.empty(len(indices), np.int32)

        def read(row, index, flip):
            image, y[row] = self._readable(int(index))
            x[row] = image[:, ::-1] if flip else image

        for _ in self._pool.map(read, range(len(x)), indices, flips):
            pass
        return {"x": x, "y": y}

    def present(self, indices):
        """-> uint8 (n, size, size, 3): the pictures at these indices, those left out that cannot be used."""
        def read(index):
            try:
                return self.read(index)[0]
            except BadImage as e:
                self._skip(e)

        found = [x for x in self._pool.map(read, [int(i) for i in indices]) if x is not None]
        return np.stack(found) if found else np.empty((0, self.size, self.size, 3), np.uint8)


def open_pictures(source, path, name, split, size, max_skipped):
    """The pictures that the flags of cli.define_source name -> Pictures. Raises UserError naming the flag."""
    if not path:
        raise UserError("--path is missing: name the folder of class folders, or of tensorflow-datasets")
    if source == "tfds" and not name:
        raise UserError("--name is missing: which data set, e.g. --name=imagenet2012")
    raw = Folder(path) if source == "folder" else Tfds(name, split, path)
    return Pictures(raw, size, max_skipped)


def shares(source, size):
    """This host's part of every `size` pictures of the source, those left out that cannot be used."""
    for start in range(0, len(source), size):
        indices = np.array_split(np.arange(start, min(start + size, len(source))), jax.process_count())
        yield source.present(indices[jax.process_index()])


def spread(source, count):
    """`count` pictures of the source, evenly spread; for those that cannot be used, others."""
    order = np.linspace(0, len(source) - 1, count).round().astype(int)
    order, found = np.concatenate([order, np.setdiff1d(np.arange(len(source)), order)]), []
    while len(order) and count:
        found.append(source.present(order[:count]))
        order, count = order[count:], count - len(found[-1])
    return np.concatenate(found)
