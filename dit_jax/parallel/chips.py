"""The figures of TPU chips by their data sheets, and the arithmetic rate of a device."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip, as its data sheet has it. devices: JAX devices a chip (v2 and v3 show each of two cores).
    hbm: bytes that libtpu 0.0.42 leaves to the program of one device. flops: bfloat16 FLOP/s. bandwidth: HBM bytes/s.
    interconnect: bytes/s into a chip over all its links."""
    name: str
    devices: int
    hbm: float
    flops: float
    bandwidth: float
    interconnect: float
    source: str


DOCS = "docs.cloud.google.com/tpu/docs/"
# By the device kind that JAX reports. v2's and v3's links: Jouppi et al., A Domain-Specific Supercomputer for Training
# Deep Neural Networks, CACM 63(7), 2020 (4 links of 496 and 656 Gbit/s); v4's: Jouppi et al., TPU v4, ISCA 2023 (6 links
# of 50 GB/s). The others' are half the data sheet's bidirectional figure.
CHIPS = {
    "TPU v2": Chip("v2", 2, 7.48 * GIB, 45e12, 700e9, 248e9, DOCS + "v2, CACM 63(7)"),
    "TPU v3": Chip("v3", 2, 15.48 * GIB, 123e12, 900e9, 328e9, DOCS + "v3, CACM 63(7)"),
    "TPU v4": Chip("v4", 1, 30.75 * GIB, 275e12, 1200e9, 300e9, DOCS + "v4, ISCA 2023"),
    "TPU v5 lite": Chip("v5e", 1, 15.75 * GIB, 197e12, 819e9, 200e9, DOCS + "v5e"),
    "TPU v5": Chip("v5p", 1, 95.74 * GIB, 459e12, 2765e9, 600e9, DOCS + "v5p"),
    "TPU v6 lite": Chip("v6e", 1, 31.25 * GIB, 918e12, 1638e9, 400e9, DOCS + "v6e"),
}
CHIPS |= {"TPU v5e": CHIPS["TPU v5 lite"], "TPU v5p": CHIPS["TPU v5"], "TPU v6e": CHIPS["TPU v6 lite"]}


def data_sheet():
    """bfloat16 FLOP/s of one device by its data sheet, None where CHIPS has none."""
    kind = jax.devices()[0].device_kind
    return CHIPS[kind].flops / CHIPS[kind].devices if kind in CHIPS else None


def measured_flops(dtype):
    """FLOP/s of one device in a large matrix product in `dtype`, the best of a few."""
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


def peak_flops(dtype):
    """(FLOP/s of one device, where the figure comes from): the data sheet's for a TPU; elsewhere measured."""
    if data_sheet():
        return data_sheet(), f"{jax.devices()[0].device_kind} data sheet, bfloat16"
    return measured_flops(dtype), f"measured matrix product, {jnp.dtype(dtype).name}"
