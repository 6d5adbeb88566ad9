"""Files of weights, read an array at a time and without PyTorch: .pt (since PyTorch 1.6 a zip file) and .npz.

Nothing in a .pt's pickle is run: it may name dicts, tensors and the published code's command line, and nothing else.
"""

import argparse
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from dit_jax.config import UserError

UNREADABLE = (OSError, ValueError, TypeError, EOFError, RuntimeError, KeyError, zipfile.BadZipFile,
              pickle.UnpicklingError)
STORAGES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
            "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
            "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
            "ComplexFloatStorage": np.complex64, "ComplexDoubleStorage": np.complex128}


def unreadable(path, e):
    return UserError(f"{path}: cannot be read as weights ({str(e).partition(chr(10))[0] or 'cut short'})")


@dataclass
class Stored:
    """An array in a zip file. start: bytes before its first element; strides: in elements."""
    archive: zipfile.ZipFile
    member: str
    dtype: np.dtype
    start: int
    shape: tuple
    strides: tuple

    def read(self):
        """A new array. The member is read to its end, where zipfile compares the checksum."""
        size = self.archive.getinfo(self.member).file_size
        data, done = np.empty(size, np.uint8), 0
        with self.archive.open(self.member) as f:
            while part := f.read(2**20):
                data[done: done + len(part)] = np.frombuffer(part, np.uint8)
                done += len(part)
        strides = [s * self.dtype.itemsize for s in self.strides]
        return np.ndarray(self.shape, self.dtype, data, self.start, strides)


class Weights(Mapping):
    """{name: float32 array}, each read when it is asked for. Raises UserError naming the file."""

    def __init__(self, path, arrays):
        for name, a in arrays.items():
            if a.dtype.kind != "f" and a.dtype != ml_dtypes.bfloat16:
                raise UserError(f"{path}: {name} is {a.dtype}, not floating point")
        self.path, self.arrays = path, arrays

    def __getitem__(self, name):
        stored = self.arrays[name]
        try:
            return stored.read().astype(np.float32, copy=False)
        except UNREADABLE as e:
            raise unreadable(f"{self.path}: {name}", e) from None

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


class _Pickle(pickle.Unpickler):
    """The pickle of a .pt file, its tensors as Stored."""

    def __init__(self, archive):
        self.archive = archive
        self.root = next(name for name in archive.namelist() if name.endswith("data.pkl")).removesuffix("data.pkl")
        super().__init__(archive.open(f"{self.root}data.pkl"))

    def persistent_load(self, identity):
        _, dtype, key, *_ = identity
        return f"{self.root}data/{key}", np.dtype(dtype)

    def _tensor(self, storage, offset, shape, strides, *_):
        member, dtype = storage
        return Stored(self.archive, member, dtype, offset * dtype.itemsize, tuple(shape), strides)

    def find_class(self, module, name):
        known = {("collections", "OrderedDict"): OrderedDict, ("argparse", "Namespace"): argparse.Namespace,
                 ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
                 ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor}
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return known[module, name]


def _read_header(archive, member):
    """The Stored of an .npy in an .npz."""
    with archive.open(member) as f:
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(f)
        start = f.tell()
    strides = [math.prod(shape[:i] if fortran_order else shape[i + 1:]) for i in range(len(shape))]
    return Stored(archive, member, dtype, start, shape, strides)


def read(path, which="ema"):
    """A .pt or .npz file -> Weights. Of a checkpoint {model, ema, opt, args} the entry `which`: "ema" or "raw"."""
    try:
        archive = zipfile.ZipFile(path)
        if path.endswith(".npz"):
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return Weights(path, {name.removesuffix(".npy"): _read_header(archive, name) for name in names})
        data = _Pickle(archive).load()
    except StopIteration:
        raise UserError(f"{path}: cannot be read as weights (no file of PyTorch 1.6 or later)") from None
    except UNREADABLE as e:
        raise unreadable(path, e) from None
    if isinstance(data, dict) and "ema" in data and "model" in data:
        data = data["ema" if which == "ema" else "model"]
    if not isinstance(data, dict) or not all(isinstance(a, Stored) for a in data.values()):
        raise UserError(f"{path}: holds no state dict, a mapping from names to tensors")
    return Weights(path, data)
