"""Files of weights, read without PyTorch: .pt and .bin (zip files since PyTorch 1.6), .npz and .safetensors.

No file is trusted. Nothing in a .pt's pickle is run, an array must lie within its file, and the arrays must not take
more memory than the contents of a file of this size can.
"""

import json
import math
import os
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from jaxtyping import Float
from safetensors.numpy import save_file

from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading, writing
from dit_jax.weights import torch_pickle
from dit_jax.weights.archive import Stored, memory_limit, open_zip, read_npz

# The floating-point types of .safetensors.
SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass
class Tensor:
    """An array in a .safetensors file. start: its first byte."""

    path: str
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the array takes in memory, as float32 or larger."""
        return math.prod(self.shape) * max(4, self.dtype.itemsize)

    def read(self) -> np.ndarray:
        """Reads the array."""
        count = math.prod(self.shape)
        data = np.fromfile(self.path, self.dtype, count, offset=self.start)
        if len(data) < count:
            raise EOFError("cut short")
        return data.reshape(self.shape)


Arrays = Mapping[str, Stored] | Mapping[str, Tensor] | Mapping[str, np.ndarray]


def _is_float(a: Stored | Tensor | np.ndarray) -> bool:
    return a.dtype.kind == "f" or a.dtype == ml_dtypes.bfloat16


def _check_arrays(path: str, arrays: Arrays) -> None:
    """Raises ValueError if a name cannot be shown, or if the arrays take more than memory_limit."""
    for name in arrays:
        if type(name) is not str or not name.isprintable() or len(name) > 200:
            raise ValueError("the name of an array is no name")
    if (total := sum(a.nbytes for a in arrays.values())) > memory_limit(path):
        raise ValueError(
            f"its arrays take {total / 1e9:.3g} GB, more than a file of its size holds or memory has room for"
        )


class Weights(Mapping[str, np.ndarray]):
    """{name: float32 array}. An array is read when it is asked for. Raises UserError naming the file."""

    def __init__(self, path: str, arrays: Mapping[str, Stored] | Mapping[str, Tensor]):
        _check_arrays(path, arrays)
        for name, a in arrays.items():
            if not _is_float(a):
                raise UserError(f"{path}: {name} is {str(a.dtype):.60}, not floating point")
        self.path, self.arrays = path, arrays

    def __getitem__(self, name: str) -> Float[np.ndarray, "..."]:
        stored = self.arrays[name]
        with reading(f"{self.path}: {name}", "weights"):
            return stored.read().astype(np.float32, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def _state_dict(path: str, data: Any) -> dict[str, Stored]:
    if not isinstance(data, dict) or not all(isinstance(a, Stored) for a in data.values()):
        raise UserError(f"{path}: holds no state dict, a mapping from names to tensors")
    return data


def read_safetensors(path: str) -> dict[str, Tensor]:
    """The floating-point arrays of a .safetensors file by name."""
    with safetensors.safe_open(path, "numpy"):  # raises if the header does not describe the file
        pass
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in SAFETENSORS:
            start, dtype = 8 + length + entry["data_offsets"][0], np.dtype(SAFETENSORS[entry["dtype"]])
            tensors[name] = Tensor(path, start, dtype, tuple(entry["shape"]))
    return tensors


def read(path: str, which: str = "ema") -> Weights:
    """The Weights of a .pt, .npz, .safetensors or .bin file. Raises UserError naming the file.

    which: "ema" or "raw", the entry of a training checkpoint {model, ema, opt, args} of the published code.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if not path.endswith((".pt", ".npz", ".safetensors", ".bin")):
        raise UserError(f"{path}: weights are .pt, .npz or .safetensors files")
    with reading(path, "weights"):
        memory_limit(path)
        if path.endswith(".npz"):
            return Weights(path, read_npz(path))
        if path.endswith(".safetensors"):
            return Weights(path, read_safetensors(path))
        data = torch_pickle.load(open_zip(path))
        if isinstance(data, dict) and "ema" in data and "model" in data:
            data = data["ema" if which == "ema" else "model"]
        return Weights(path, _state_dict(path, data))


def read_all(path: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz, a .safetensors or a torch file of any age, floating point as float32. Raises UserError."""
    with reading(path, "weights"):
        memory_limit(path)
        if path.endswith(".safetensors"):
            arrays = read_safetensors(path)
        elif path.endswith(".npz"):
            arrays = read_npz(path)
        elif zipfile.is_zipfile(path):
            data = torch_pickle.load(open_zip(path))
            arrays = _state_dict(path, data.get("state_dict", data) if isinstance(data, dict) else data)
        else:
            arrays = _read_old_torch(path)
        _check_arrays(path, arrays)
        values = {name: a if isinstance(a, np.ndarray) else a.read() for name, a in arrays.items()}
        return {name: a.astype(np.float32, copy=False) if _is_float(a) else a for name, a in values.items()}


def write(path: str, arrays: dict[str, Any]) -> None:
    """Writes NumPy arrays to a .pt, .npz or .safetensors file, as its name says. No incomplete file is left at `path`.

    Raises UserError, OSError.
    """
    torch = import_torch(path) if path.endswith(".pt") else None
    with writing(path) as f:
        if torch:
            torch.save(OrderedDict((name, torch.tensor(a)) for name, a in arrays.items()), f)
        elif path.endswith(".safetensors"):
            save_file(arrays, f"{path}.part")  # the file of `writing`, without a copy in memory
        else:
            np.savez(f, **arrays)


def import_torch(path: str) -> types.ModuleType:
    """The module torch. Raises UserError naming the file that needs it."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: torch files need PyTorch: pip install 'dit_jax[torch]'") from None
    return torch


def _read_old_torch(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file that PyTorch wrote before 1.6. Needs PyTorch."""
    torch = import_torch(path)
    with warnings.catch_warnings(action="ignore"):
        data = torch.load(path, map_location="cpu", weights_only=True)
    data = data.get("state_dict", data) if isinstance(data, dict) else data
    if not isinstance(data, dict) or not all(isinstance(a, torch.Tensor) for a in data.values()):
        raise UserError(f"{path}: holds no state dict, a mapping from names to tensors")
    return {name: (a.float() if a.dtype == torch.bfloat16 else a).detach().numpy() for name, a in data.items()}
