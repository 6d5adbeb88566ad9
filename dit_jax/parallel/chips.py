"""Data sheets of TPU chips, and the peak arithmetic rate of a device."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

GIB = 2**30
Devices = Sequence[Any]  # of jax.Device, which is no type to pyright


@dataclass(frozen=True)
class Chip:
    """The data sheet of a TPU chip.

    devices: JAX devices of one chip; v2 and v3 have two, one for each core.
    hbm: bytes that libtpu 0.0.42 leaves to the program of one device.
    flops: bfloat16 FLOP/s of the chip.
    bandwidth: HBM bytes/s of the chip.
    interconnect: bytes/s into the chip, over all its links.
    source: where the figures come from.
    """

    name: str
    devices: int
    hbm: float
    flops: float
    bandwidth: float
    interconnect: float
    source: str


DOCS = "docs.cloud.google.com/tpu/docs/"
# Keys: the device kind that JAX reports. The interconnect of v2 and v3 is that of 4 links of 496 and 656 Gbit/s (Jouppi
# et al., A Domain-Specific Supercomputer for Training Deep Neural Networks, CACM 63(7), 2020), that of v4 of 6 links of
# 50 GB/s (Jouppi et al., TPU v4, ISCA 2023). For the other chips it is half the bidirectional figure of the data sheet.
CHIPS = {
    "TPU v2": Chip("v2", 2, 7.48 * GIB, 45e12, 700e9, 248e9, DOCS + "v2, CACM 63(7)"),
    "TPU v3": Chip("v3", 2, 15.48 * GIB, 123e12, 900e9, 328e9, DOCS + "v3, CACM 63(7)"),
    "TPU v4": Chip("v4", 1, 30.75 * GIB, 275e12, 1200e9, 300e9, DOCS + "v4, ISCA 2023"),
    "TPU v5 lite": Chip("v5e", 1, 15.75 * GIB, 197e12, 819e9, 200e9, DOCS + "v5e"),
    "TPU v5": Chip("v5p", 1, 95.74 * GIB, 459e12, 2765e9, 600e9, DOCS + "v5p"),
    "TPU v6 lite": Chip("v6e", 1, 31.25 * GIB, 918e12, 1638e9, 400e9, DOCS + "v6e"),
}
CHIPS |= {"TPU v5e": CHIPS["TPU v5 lite"], "TPU v5p": CHIPS["TPU v5"], "TPU v6e": CHIPS["TPU v6 lite"]}


def data_sheet_flops() -> float | None:
    """Returns the bfloat16 FLOP/s of one device by its data sheet, or None if CHIPS does not have it."""
    kind = jax.devices()[0].device_kind
    return CHIPS[kind].flops / CHIPS[kind].devices if kind in CHIPS else None


def measured_flops(dtype: DTypeLike) -> float:
    """Returns the FLOP/s of one device in a large matrix product in `dtype`, the best of 5."""
    cpu = jax.default_backend() == "cpu"
    n = 1536 if cpu else 8192
    a = jnp.ones((n, n), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    share = jax.local_device_count() if cpu else 1  # fake CPU devices share the machine's cores
    return 2 * n**3 / min(times) / share


def peak_flops(dtype: DTypeLike) -> tuple[float, str]:
    """Returns (FLOP/s of one device, the origin of the figure): the data sheet of a TPU, a measurement elsewhere."""
    flops = data_sheet_flops()
    if flops:
        return flops, f"{jax.devices()[0].device_kind} data sheet, bfloat16"
    return measured_flops(dtype), f"measured matrix product, {jnp.dtype(dtype).name}"
