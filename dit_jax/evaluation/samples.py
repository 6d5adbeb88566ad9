"""Finished pictures to be measured: an .npz as the published sampler writes it, or a folder of PNGs."""

import math
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from dit_jax.data.decode import decode, read_file
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading
from dit_jax.weights.archive import open_zip, read_header

KEY = "arr_0"
DAMAGED = "is no .npz file, cut short or damaged ({reason}): copy or make it again"


class Npz:
    """The pictures under `arr_0` of an .npz file, stored or compressed: uint8 (N, H, W, 3).

    Raises UserError naming the file, also at the end of batches() if a byte was changed.

    Attributes:
      path.
      shape: (N, H, W, 3).
    """

    def __init__(self, path: str):
        self.path = path
        with reading(path, "pictures", DAMAGED):
            archive = open_zip(path, in_pieces=True)
            if f"{KEY}.npy" not in archive.namelist():
                raise UserError(
                    f"{path}: has no array {KEY!r}: it must hold pictures under this name, uint8 of (N, H, W, 3)"
                )
            self.stored = read_header(archive, f"{KEY}.npy")
        self.shape = self.stored.shape
        picture = self.shape[1:]
        row_major = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        is_rgb = len(picture) == 3 and picture[-1] == 3 and 0 not in picture
        if self.stored.dtype != np.uint8 or not is_rgb or self.stored.strides != row_major:
            raise UserError(
                f"{path}: {KEY} is {str(self.stored.dtype):.60} of {self.shape}: it must be uint8 of (N, H, W, 3), "
                "pictures of 0 to 255"
            )

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """Yields the pictures in order, `size` at a time, without holding more than that in memory."""
        count, picture = self.shape[0], math.prod(self.shape[1:])
        with reading(self.path, "pictures", DAMAGED), self.stored.archive.open(self.stored.member) as f:
            f.read(self.stored.start)
            for start in range(0, count, size):
                n = min(size, count - start)
                data = f.read(n * picture)  # with the last byte, zipfile checks the CRC-32 of the whole
                if len(data) < n * picture:
                    raise EOFError(f"{start + len(data) // picture} of {count} pictures")
                yield np.frombuffer(data, np.uint8).reshape(n, *self.shape[1:])


class Pngs:
    """The PNG files of a folder in the order of their names, all of one size. Attributes and errors as in Npz."""

    def __init__(self, path: str):
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

    def batches(self, size: int) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """Yields the pictures in order, `size` at a time."""
        for start in range(0, len(self.names), size):
            names = self.names[start : start + size]
            pictures = [self._read(name) for name in names]
            for name, picture in zip(names, pictures):
                if picture.shape != self.shape[1:]:
                    raise UserError(
                        f"{os.path.join(self.path, name)}: is of {_pixels(picture.shape)}, and "
                        f"{self.names[0]} of {_pixels(self.shape[1:])}: all must be of one size"
                    )
            yield np.stack(pictures)


def _pixels(shape):
    return f"{shape[1]} x {shape[0]} pixels"


def load(path: str) -> Npz | Pngs:
    """Returns the pictures of an .npz file or of a folder of PNGs. Raises UserError naming the file."""
    if os.path.isdir(path):
        return Pngs(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder: name an .npz of pictures, or a folder of PNGs")
    return Npz(path)
