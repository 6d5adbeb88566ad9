"""Finished pictures that are to be measured: an .npz as the published sampler writes it, or a folder of PNGs."""

import contextlib
import os
import zipfile
import zlib

import numpy as np

from dit_jax.data.images import BadImage, decode

KEY = "arr_0"
_DAMAGED = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@contextlib.contextmanager
def _member(path):
    """-> (`arr_0` of an .npz file, open behind its header; shape, whether in Fortran's order, dtype). What goes wrong, also
    while it is read, becomes a ValueError naming the file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{KEY}.npy") as f:
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            yield f, *read[np.lib.format.read_magic(f)[0]](f)
    except KeyError:
        raise ValueError(f"{path}: has no array {KEY!r}: it must hold pictures under this name, uint8 of (N, H, W, 3)"
                         ) from None
    except _DAMAGED as e:
        what = " ".join(str(e).split())[:150] or type(e).__name__
        raise ValueError(f"{path}: is no .npz file, cut short or damaged ({what}): copy or make it again") from None


class Npz:
    """The pictures under `arr_0` of an .npz file, stored or compressed: uint8 (N, H, W, 3).

    Attributes: path, shape (N, H, W, 3). batches(size): the pictures in order, `size` at a time, of memory for so many.
    Raises ValueError naming the file, also where at the end a byte turns out to have changed.
    """

    def __init__(self, path):
        self.path = path
        with _member(path) as (_, shape, fortran, dtype):
            pass
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
            raise ValueError(f"{path}: {KEY} is {dtype} of {shape}: it must be uint8 of (N, H, W, 3), pictures of 0 to 255")
        self.shape = shape

    def batches(self, size):
        count, picture = self.shape[0], int(np.prod(self.shape[1:]))
        with _member(self.path) as (f, *_):
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
            raise ValueError(f"{path}: cannot be read ({e.strerror})") from None
        if not self.names:
            raise ValueError(f"{path}: this folder holds no PNG files: name the one that holds the pictures themselves")
        self.shape = (len(self.names), *self._read(self.names[0]).shape)

    def _read(self, name):
        file = os.path.join(self.path, name)
        try:
            with open(file, "rb") as f:
                return np.asarray(decode(f.read()))
        except (BadImage, OSError) as e:
            raise ValueError(f"{file}: {getattr(e, 'reason', None) or e.strerror}") from None

    def batches(self, size):
        for start in range(0, len(self.names), size):
            names = self.names[start: start + size]
            pictures = [self._read(name) for name in names]
            for name, picture in zip(names, pictures):
                if picture.shape != self.shape[1:]:
                    raise ValueError(f"{os.path.join(self.path, name)}: is of {_px(picture.shape)}, and "
                                     f"{self.names[0]} of {_px(self.shape[1:])}: all must be of one size")
            yield np.stack(pictures)


def _px(shape):
    return f"{shape[1]} x {shape[0]} pixels"


def load(path):
    """The pictures of an .npz file or a folder of PNGs. Raises ValueError naming the file."""
    if os.path.isdir(path):
        return Pngs(path)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder: name an .npz of pictures, or a folder of PNGs")
    return Npz(path)
