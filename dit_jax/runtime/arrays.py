"""Arrays in host memory."""

import math

import numpy as np


def aligned_empty(shape, dtype):
    """np.empty that starts at a multiple of 64 bytes: XLA on CPU takes such an array without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start: start + size].view(dtype).reshape(shape)
