"""Files of weights, read without PyTorch: .pt and the like (since PyTorch 1.6 a zip file), .npz and .safetensors.

Nothing in a .pt's pickle is run: it may name dicts, tensors and the published code's command line, and nothing else.
No file is believed: an array lies within what the file holds, and takes no more memory than a file of its size may.
"""

import io
import math
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import safetensors

from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading, writing

LEAST, MOST = 2**26, 16  # a file may hold so many bytes, or so many times its own
MOST_IN_PIECES = 512  # drawings pack to a hundredth of their size; nothing but zeros to a thousandth
PICKLE = 2**22  # bytes of a pickle: that of a training checkpoint of XL/2 takes an eighth of it
# What torch.save writes of plain data. Others reserve memory before anything is read, or hash what is nested without end.
OPCODES = """PROTO FRAME STOP MARK POP GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID PUT BINPUT LONG_BINPUT MEMOIZE GET
    BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE
    BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS""".split()
STORAGES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
            "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
            "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
            "ComplexFloatStorage": np.complex64, "ComplexDoubleStorage": np.complex128}

SAFE = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}  # of .safetensors


def limit(path):
    """Bytes that the contents of a file may take: more are a lie, or would not fit in this machine's memory. Raises
    UserError where the file itself does not."""
    size, memory = os.path.getsize(path), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UserError(f"{path}: takes {size / 1e9:.1f} GB of memory, and this machine has {memory / 1e9:.1f} GB")
    return min(max(LEAST, MOST * size), memory)


def open_zip(path, in_pieces=False):
    """A zip file whose members can be read: each name once, and no more in all than a file of its size holds. in_pieces:
    not all of it is to be in memory at once."""
    archive = zipfile.ZipFile(path)
    members, most = archive.infolist(), max(LEAST, (MOST_IN_PIECES if in_pieces else MOST) * os.path.getsize(path))
    if (total := sum(m.file_size for m in members)) > most:
        raise ValueError(f"it declares {total / 1e9:.3g} GB, and a file of its size holds {most / 1e9:.3g} GB at most")
    if len({m.filename for m in members}) < len(members):
        raise ValueError("it holds two members of one name")
    # zipfile unpacks the other kinds without an end.
    if not all(m.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for m in members):
        raise ValueError("it is packed neither by deflate nor not at all")
    return archive


@dataclass
class Stored:
    """An array in a zip file. start: bytes before its first element; strides: in elements. Raises ValueError where it
    is none that lies within its member."""
    archive: zipfile.ZipFile
    member: str
    dtype: np.dtype
    start: int
    shape: tuple
    strides: tuple

    def __post_init__(self):
        numbers = (self.start, *self.shape, *self.strides)
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(self.shape) != len(self.strides):
            raise ValueError("an array's shape or strides are not whole numbers of 0 or more")
        if self.dtype.hasobject or not self.dtype.itemsize:
            raise ValueError(f"an array of {self.dtype}")
        count, room = math.prod(self.shape), (self.size - self.start) // self.dtype.itemsize
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides)) if count else -1
        if max(count, last + 1) > room:
            raise ValueError(f"{self.member:.100} holds {max(room, 0)} numbers, and an array of {count} is to lie in it")

    @property
    def size(self):
        return self.archive.getinfo(self.member).file_size

    @property
    def nbytes(self):
        """Bytes that reading it takes: the whole member is unpacked for each array that lies in it."""
        return max(self.size, math.prod(self.shape) * max(4, self.dtype.itemsize))

    def read(self):
        """A new array. The member is read to its end, where zipfile compares the checksum."""
        data, done = np.empty(self.size, np.uint8), 0
        with self.archive.open(self.member) as f:
            while part := f.read(2**20):
                data[done: done + len(part)] = np.frombuffer(part, np.uint8)
                done += len(part)
        if done < len(data):
            raise EOFError("cut short")
        strides = [s * self.dtype.itemsize for s in self.strides]
        return np.ndarray(self.shape, self.dtype, data, self.start, strides)


def _is_float(a):
    return a.dtype.kind == "f" or a.dtype == ml_dtypes.bfloat16


def _checked(path, arrays):
    """The same arrays, in a file or not, if their names can be shown and they fit in memory."""
    for name in arrays:
        if type(name) is not str or not name.isprintable() or len(name) > 200:
            raise ValueError("the name of an array is no name")
    if (total := sum(a.nbytes for a in arrays.values())) > limit(path):
        raise ValueError(f"its arrays take {total / 1e9:.3g} GB, more than a file of its size holds or memory has room for")
    return arrays


class Weights(Mapping):
    """{name: float32 array}, each read when it is asked for. Raises UserError naming the file."""

    def __init__(self, path, arrays):
        for name, a in _checked(path, arrays).items():
            if not _is_float(a):
                raise UserError(f"{path}: {name} is {str(a.dtype):.60}, not floating point")
        self.path, self.arrays = path, arrays

    def __getitem__(self, name):
        stored = self.arrays[name]
        with reading(f"{self.path}: {name}", "weights"):
            return stored.read().astype(np.float32, copy=False)

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


def _dict():
    return {}


class _Pickle(pickle._Unpickler):
    """The pickle of a .pt file, its tensors as Stored. Python's own reader takes no memory before it has read as much."""

    def _refuse(self):
        raise pickle.UnpicklingError("it holds what torch.save does not write")

    dispatch = dict.fromkeys(range(256), _refuse) | {
        code: pickle._Unpickler.dispatch[code] for name in OPCODES for code in getattr(pickle, name)}

    def __init__(self, archive):
        self.archive = archive
        member = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if member is None:
            raise ValueError("no file of PyTorch 1.6 or later")
        self.root = member.removesuffix("data.pkl")
        if archive.getinfo(member).file_size > PICKLE:
            raise ValueError(f"{member:.100} is larger than {PICKLE} bytes")
        if f"{self.root}byteorder" in archive.namelist() and self._bytes("byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        super().__init__(io.BytesIO(self._bytes("data.pkl")))

    def _bytes(self, name):
        with self.archive.open(self.root + name) as f:
            return f.read(PICKLE)  # not what the member declares, nor what it unpacks to

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
        known = {("collections", "OrderedDict"): _dict, ("argparse", "Namespace"): _dict,
                 ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
                 ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor}
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return known[module, name]

    def _drop_state(self):  # attributes, which nobody asks for
        self.stack.pop()

    def _set(self, items):
        there = self.stack[-1]
        if type(there) is not dict or not all(type(key) in (str, int) for key in items[::2]):
            raise pickle.UnpicklingError("a key is neither a name nor a number")
        there.update(zip(items[::2], items[1::2], strict=True))

    def _set_one(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_all(self):
        self._set(self.pop_mark())

    dispatch |= {pickle.BUILD[0]: _drop_state, pickle.SETITEM[0]: _set_one, pickle.SETITEMS[0]: _set_all,
                 pickle.NEWOBJ[0]: dispatch[pickle.REDUCE[0]]}


def read_header(archive, member):
    """The Stored of an .npy in an .npz."""
    with archive.open(member) as f:
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(f)
        start = f.tell()
    strides = [math.prod(shape[:i] if fortran_order else shape[i + 1:]) for i in range(len(shape))]
    stored = Stored(archive, member, dtype, start, shape, tuple(strides))
    if stored.size != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{member:.100} is longer than its array")
    return stored


def read_npz(path):
    """{name: Stored} of an .npz."""
    archive = open_zip(path)
    return {name.removesuffix(".npy"): read_header(archive, name) for name in archive.namelist() if name.endswith(".npy")}


def _state_dict(path, data):
    if not isinstance(data, dict) or not all(isinstance(a, Stored) for a in data.values()):
        raise UserError(f"{path}: holds no state dict, a mapping from names to tensors")
    return data


def read(path, which="ema"):
    """A .pt or .npz file -> Weights: {name: float32 array}, read when asked for. Of a checkpoint {model, ema, opt, args}
    the entry `which`: "ema" or "raw". Raises UserError naming the file."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if not path.endswith((".pt", ".npz")):
        raise UserError(f"{path}: weights are .pt or .npz files")
    with reading(path, "weights"):
        if path.endswith(".npz"):
            return Weights(path, read_npz(path))
        data = _Pickle(open_zip(path)).load()
        if isinstance(data, dict) and "ema" in data and "model" in data:
            data = data["ema" if which == "ema" else "model"]
        return Weights(path, _state_dict(path, data))


def read_all(path):
    """An .npz, .safetensors or torch file of any age -> {name: array}, floating point as float32."""
    with reading(path, "weights"):
        limit(path)
        if path.endswith(".safetensors"):
            with open(path, "rb") as f:
                arrays = {name: np.frombuffer(a["data"], SAFE[a["dtype"]]).reshape(a["shape"])
                          for name, a in safetensors.deserialize(f.read()) if a["dtype"] in SAFE}
        elif path.endswith(".npz"):
            arrays = read_npz(path)
        elif zipfile.is_zipfile(path):
            data = _Pickle(open_zip(path)).load()
            arrays = _state_dict(path, data.get("state_dict", data) if isinstance(data, dict) else data)
        else:
            arrays = _before_zip(path)
        arrays = {name: a.read() if isinstance(a, Stored) else a for name, a in _checked(path, arrays).items()}
        return {name: a.astype(np.float32, copy=False) if _is_float(a) else a for name, a in arrays.items()}


def write(path, arrays):
    """Writes {name: array} as a .pt or .npz file. A file under `path` is always whole."""
    torch = import_torch(path) if path.endswith(".pt") else None
    with writing(path) as f:
        if torch:
            torch.save(OrderedDict((name, torch.tensor(a)) for name, a in arrays.items()), f)
        else:
            np.savez(f, **arrays)


def import_torch(path):
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: torch files need PyTorch: pip install 'dit_jax[torch]'") from None
    return torch


def _before_zip(path):
    """The arrays of a file as PyTorch wrote it before 1.6."""
    torch = import_torch(path)
    with warnings.catch_warnings(action="ignore"):
        data = torch.load(path, map_location="cpu", weights_only=True)
    data = data.get("state_dict", data) if isinstance(data, dict) else data
    if not isinstance(data, dict) or not all(isinstance(a, torch.Tensor) for a in data.values()):
        raise UserError(f"{path}: holds no state dict, a mapping from names to tensors")
    return {name: (a.float() if a.dtype == torch.bfloat16 else a).detach().numpy() for name, a in data.items()}
