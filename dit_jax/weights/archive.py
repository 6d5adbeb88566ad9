"""Arrays in zip files: .npz, and .pt as PyTorch writes it since 1.6. Each is read when it is asked for.

What a file declares is not trusted: an array must lie within its member, and the members must not take more memory than
the contents of a file of this size can.
"""

import math
import os
import zipfile
from dataclasses import dataclass

import numpy as np

from dit_jax.runtime.errors import UserError

# The contents of a file may take MIN_LIMIT bytes, or so many times the bytes of the file.
MIN_LIMIT = 2**26
RATIO = 16
RATIO_IN_PIECES = 512  # drawings compress to a hundredth of their size, zeros alone to a thousandth


def memory_limit(path: str) -> int:
    """The bytes that the contents of a file may take in memory. Raises UserError if the file itself takes more."""
    size, memory = os.path.getsize(path), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise UserError(f"{path}: takes {size / 1e9:.1f} GB of memory, and this machine has {memory / 1e9:.1f} GB")
    return min(max(MIN_LIMIT, RATIO * size), memory)


def open_zip(path: str, in_pieces: bool = False) -> zipfile.ZipFile:
    """Opens a zip file and checks what its directory declares. Raises ValueError.

    in_pieces: whether the contents are never all in memory at once, so that the limit may be higher.
    """
    archive = zipfile.ZipFile(path)
    members, ratio = archive.infolist(), RATIO_IN_PIECES if in_pieces else RATIO
    total, limit = sum(member.file_size for member in members), max(MIN_LIMIT, ratio * os.path.getsize(path))
    if total > limit:
        raise ValueError(f"it declares {total / 1e9:.3g} GB, and a file of its size holds at most {limit / 1e9:.3g} GB")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two of its members have the same name")
    # Python's zipfile unpacks other methods without a limit.
    if not all(member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("a member is compressed by another method than deflate")
    return archive


@dataclass
class Stored:
    """An array in a member of a zip file. Raises ValueError if it does not lie within the member.

    start: bytes before its first element. strides: in elements.
    """

    archive: zipfile.ZipFile
    member: str
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        numbers = (self.start, *self.shape, *self.strides)
        if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(self.shape) != len(self.strides):
            raise ValueError("an array's shape or strides are not whole numbers of 0 or more")
        if self.dtype.hasobject or not self.dtype.itemsize:
            raise ValueError(f"an array is of {self.dtype}")
        count, room = math.prod(self.shape), (self.size - self.start) // self.dtype.itemsize
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides)) if count else -1
        if max(count, last + 1) > room:
            raise ValueError(f"{self.member:.100} holds {max(room, 0)} numbers, too few for an array of {count}")

    @property
    def size(self) -> int:
        """Bytes of the member."""
        return self.archive.getinfo(self.member).file_size

    @property
    def nbytes(self) -> int:
        """Bytes that reading the array takes. The whole member is unpacked for each array in it."""
        return max(self.size, math.prod(self.shape) * max(4, self.dtype.itemsize))

    def read(self) -> np.ndarray:
        """Reads the array. The member is read to its end, where zipfile compares the checksum."""
        data, done = np.empty(self.size, np.uint8), 0
        with self.archive.open(self.member) as f:
            while part := f.read(2**20):
                data[done : done + len(part)] = np.frombuffer(part, np.uint8)
                done += len(part)
        if done < len(data):
            raise EOFError("cut short")
        strides = [s * self.dtype.itemsize for s in self.strides]
        return np.ndarray(self.shape, self.dtype, data, self.start, strides)


def read_header(archive: zipfile.ZipFile, member: str) -> Stored:
    """The Stored of an .npy in an .npz. Raises ValueError."""
    with archive.open(member) as f:
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(f)
        start = f.tell()
    strides = [math.prod(shape[:i] if fortran_order else shape[i + 1 :]) for i in range(len(shape))]
    stored = Stored(archive, member, dtype, start, shape, tuple(strides))
    if stored.size != start + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{member:.100} is longer than its array")
    return stored


def read_npz(path: str) -> dict[str, Stored]:
    """The arrays of an .npz by name. Raises ValueError, or another error of a parser."""
    archive = open_zip(path)
    members = [name for name in archive.namelist() if name.endswith(".npy")]
    return {name.removesuffix(".npy"): read_header(archive, name) for name in members}
