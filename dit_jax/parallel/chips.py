"""Data sheets of TPU chips and GPUs, and the peak arithmetic rate of a device."""

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
    """The data sheet of a TPU chip or a GPU.

    devices: JAX devices of one chip; v2 and v3 have two, one for each core.
    hbm: of a TPU the bytes that libtpu 0.0.42 leaves to the program of one device; of a GPU all of its memory.
    flops: bfloat16 FLOP/s of the chip, of dense products summed in float32.
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


NVIDIA = "nvidia.com data sheet of "
# The interconnect is NVLink's, or PCIe's of a card without it. The figure of the data sheets is of both directions.
# They print rates with sparsity: half of that is dense. The GeForce sheets tell the rates with sums in float32 apart.
GPUS = {
    "NVIDIA A100-SXM4-40GB": Chip("A100 40GB SXM", 1, 40e9, 312e12, 1555e9, 300e9, NVIDIA + "A100"),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80GB SXM", 1, 80e9, 312e12, 2039e9, 300e9, NVIDIA + "A100"),
    "NVIDIA A100-PCIE-40GB": Chip("A100 40GB PCIe", 1, 40e9, 312e12, 1555e9, 32e9, NVIDIA + "A100"),
    "NVIDIA A100 80GB PCIe": Chip("A100 80GB PCIe", 1, 80e9, 312e12, 1935e9, 32e9, NVIDIA + "A100"),
    "NVIDIA H100 80GB HBM3": Chip("H100 SXM", 1, 80e9, 989e12, 3350e9, 450e9, NVIDIA + "H100"),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 1, 80e9, 756e12, 2000e9, 64e9, NVIDIA + "H100 PCIe"),
    "NVIDIA H200": Chip("H200", 1, 141e9, 989e12, 4800e9, 450e9, NVIDIA + "H200"),
    "NVIDIA A10": Chip("A10", 1, 24e9, 125e12, 600e9, 32e9, NVIDIA + "A10"),
    "NVIDIA L4": Chip("L4", 1, 24e9, 121e12, 300e9, 32e9, NVIDIA + "L4"),
    "NVIDIA L40S": Chip("L40S", 1, 48e9, 362e12, 864e9, 32e9, NVIDIA + "L40S"),
    "NVIDIA GeForce RTX 3090": Chip("RTX 3090", 1, 24e9, 71e12, 936e9, 32e9, "Ampere GA102 whitepaper, appendix A"),
    "NVIDIA GeForce RTX 4090": Chip("RTX 4090", 1, 24e9, 165e12, 1008e9, 32e9, "Ada whitepaper, appendix A"),
}


def has_bfloat16(device: Any) -> bool:
    """Returns whether this device multiplies in bfloat16 at full rate: a TPU, or a GPU of compute capability 8.0 on."""
    if device.platform != "gpu":
        return device.platform == "tpu"
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; of AMD another kind of name: "gfx90a"
    return device.device_kind in GPUS or capability.replace(".", "").isdigit() and float(capability) >= 8


def peak_memory() -> int | None:
    """Returns the most bytes that one local device has held, or None where the device does not tell, as on CPU."""
    return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()) or None


def data_sheet_flops() -> float | None:
    """Returns the bfloat16 FLOP/s of one device by its data sheet, or None if neither CHIPS nor GPUS has it."""
    chip = (CHIPS | GPUS).get(jax.devices()[0].device_kind)
    return chip and chip.flops / chip.devices


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
    """Returns (FLOP/s of one device, the origin of the figure): a data sheet, or a measurement."""
    flops = data_sheet_flops()
    if flops:
        return flops, f"{jax.devices()[0].device_kind} data sheet, bfloat16"
    return measured_flops(dtype), f"measured matrix product, {jnp.dtype(dtype).name}"
