"""The pickle of a .pt file, read without PyTorch and without running anything.

It may name dicts, tensors and the published code's command line, and nothing else.
"""

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from dit_jax.weights.archive import Stored

MAX_BYTES = 2**22  # of a pickle; that of a training checkpoint of XL/2 has an eighth of it
# What torch.save writes for plain data. Others reserve memory before anything is read, or hash endless nesting.
OPCODES = """PROTO FRAME STOP MARK POP GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID PUT BINPUT LONG_BINPUT MEMOIZE
    GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST
    APPEND APPENDS EMPTY_DICT SETITEM SETITEMS""".split()
STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}


def load(archive: zipfile.ZipFile) -> Any:
    """The object that torch.save wrote, with Stored for tensors. Raises ValueError or UnpicklingError, among others."""
    return _Unpickler(archive).load()


def _new_dict():
    return {}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler takes no memory before it has read as much; the one in C does."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def _refuse(self):
        raise pickle.UnpicklingError("it holds what torch.save does not write")

    dispatch: dict[int, Callable] = dict.fromkeys(range(256), _refuse) | {
        code: pickle._Unpickler.dispatch[code] for name in OPCODES for code in getattr(pickle, name)
    }

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        member = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if member is None:
            raise ValueError("no file of PyTorch 1.6 or later")
        self.root = member.removesuffix("data.pkl")
        if archive.getinfo(member).file_size > MAX_BYTES:
            raise ValueError(f"{member:.100} is larger than {MAX_BYTES} bytes")
        if f"{self.root}byteorder" in archive.namelist() and self._read("byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        super().__init__(io.BytesIO(self._read("data.pkl")))

    def _read(self, name):
        with self.archive.open(self.root + name) as f:
            return f.read(MAX_BYTES)  # neither the declared size nor the unpacked one can be trusted

    def persistent_load(self, identity):
        _, dtype, key, *_ = identity
        if type(key) is not str or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError("a tensor without numbers")
        member = f"{self.root}data/{key}"
        count = self.archive.getinfo(member).file_size // dtype.itemsize
        return Stored(self.archive, member, dtype, 0, (count,), (1,))

    def _tensor(self, storage, offset, shape, strides, *_):
        if not isinstance(storage, Stored) or type(offset) is not int:
            raise pickle.UnpicklingError("a tensor without numbers")
        return replace(storage, start=offset * storage.dtype.itemsize, shape=tuple(shape), strides=tuple(strides))

    def find_class(self, module, name):
        known = {
            ("collections", "OrderedDict"): _new_dict,
            ("argparse", "Namespace"): _new_dict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return known[module, name]

    def _drop_state(self):  # the attributes of an object, which are not needed
        self.stack.pop()

    def _set(self, items):
        target = self.stack[-1]
        if type(target) is not dict or not all(type(key) in (str, int) for key in items[::2]):
            raise pickle.UnpicklingError("a key is neither a name nor a number")
        target.update(zip(items[::2], items[1::2], strict=True))

    def _set_one(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_all(self):
        self._set(self.pop_mark())

    dispatch |= {
        pickle.BUILD[0]: _drop_state,
        pickle.SETITEM[0]: _set_one,
        pickle.SETITEMS[0]: _set_all,
        pickle.NEWOBJ[0]: dispatch[pickle.REDUCE[0]],
    }
