"""Arrays in host memory."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike


def aligned_empty(shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
    """Returns an uninitialised array that starts at a multiple of 64 bytes: XLA on CPU takes it without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
