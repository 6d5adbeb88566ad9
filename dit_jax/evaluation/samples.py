"""Finished pictures that are to be measured: an .npz as the published sampler writes it, or a folder of PNGs."""

import math
import os

import numpy as np

from dit_jax.data.decode import decode, read_file
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading
from dit_jax.weights.files import open_zip, read_header

KEY = "arr_0"
DAMAGED = "is no .npz file, cut short or damaged ({reason}): copy or make it again"


class Npz:
    """The pictures under `arr_0` of an .npz file, stored or compressed: uint8 (N, H, W, 3).

    Attributes: path, shape (N, H, W, 3). batches(size): the pictures in order, `size` at a time, of memory for so many.
    Raises UserError naming the file, also where at the end a byte turns out to have changed.
    """

    def __init__(self, path):
        self.path = path
        with reading(path, "pictures", DAMAGED):
            archive = open_zip(path, in_pieces=True)
            if f"{KEY}.npy" not in archive.namelist():
                raise UserError(f"{path}: has no array {KEY!r}: it must hold pictures under this name, uint8 of (N, H, W, 3)")
            self.stored = read_header(archive, f"{KEY}.npy")
        n, *picture = self.shape = self.stored.shape
        strides = tuple(math.prod(self.shape[i + 1:]) for i in range(len(self.shape)))
        if self.stored.dtype != np.uint8 or len(picture) != 3 or 0 in picture or picture[-1] != 3 or (
                self.stored.strides != strides):
            raise UserError(f"{path}: {KEY} is {str(self.stored.dtype):.60} of {self.shape}: it must be uint8 of (N, H, W, 3), "
                            "pictures of 0 to 255")

    def batches(self, size):
        count, picture = self.shape[0], math.prod(self.shape[1:])
        with reading(self.path, "pictures", DAMAGED), self.stored.archive.open(self.stored.member) as f:
            f.read(self.stored.start)
            for start in range(0, count, size):
                n = min(size, count - start)
                data = f.read(n * picture)  # with the last byte the CRC-32 of them all is checked
                if len(data) < n * picture:
                    raise EOFError(f"{start + len(data) // picture} of {count} pictures")
                yield np.frombuffer(data, np.uint8).reshape(n, *self.shape[1:])


class Pngs:
    """The PNG files of a folder in the order of their names, all of one size. Attributes and errors as of Npz."""

    def __init__(self, path):
        self.path = path
        try:
            self.names = sorted(name for name in os.listdir(path) if name.lower().endswith(".png"))
        except OSError as e:
            raise UserError(f"{path}: cannot be read ({e.strerror})") from None
        if not self.names:
            raise UserError(f"{path}: this folder holds no PNG files: name the one that holds the pictures themselves")
        self.shape = (len(self.names), *self._read(self.names[0]).shape)

    def _read(self, name):
        file = os.path.join(self.path, name)
        with reading(file, "a picture", "{reason}"):
            return np.asarray(decode(read_file(file)))

    def batches(self, size):
        for start in range(0, len(self.names), size):
            names = self.names[start: start + size]
            pictures = [self._read(name) for name in names]
            for name, picture in zip(names, pictures):
                if picture.shape != self.shape[1:]:
                    raise UserError(f"{os.path.join(self.path, name)}: is of {_px(picture.shape)}, and "
                                     f"{self.names[0]} of {_px(self.shape[1:])}: all must be of one size")
            yield np.stack(pictures)


def _px(shape):
    return f"{shape[1]} x {shape[0]} pixels"


def load(path):
    """The pictures of an .npz file or a folder of PNGs. Raises UserError naming the file."""
    if os.path.isdir(path):
        return Pngs(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder: name an .npz of pictures, or a folder of PNGs")
    return Npz(path)
