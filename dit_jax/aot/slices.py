"""TPU slices for which programs are compiled without having them."""

from typing import Any

from dit_jax.runtime.errors import UserError, first_line
from dit_jax.runtime.process import compile_only

# The chip grids of slices by their number in Cloud TPU's names. v2 to v5p names count cores, v5e and v6e names chips.
_3D = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}
_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CORES = {8: "2x2", 32: "4x4", 64: "4x8", 128: "8x8", 256: "8x16", 512: "16x16"}
_GRIDS = {
    "v2": _CORES,
    "v3": _CORES | {1024: "16x32", 2048: "32x32"},
    "v4": _3D,
    "v5e": _2D,
    "v5p": _3D,
    "v6e": _2D,
}
# {"v3-256": "v3:8x16", ...}
SLICES = {f"{chip}-{number}": f"{chip}:{grid}" for chip, grids in _GRIDS.items() for number, grid in grids.items()}


def find_devices(topology: str, flag: str = "topology") -> list:
    """Returns the compile-only devices of a slice such as "v3:8x16" or "v3-256". Raises UserError naming the flag."""
    from jax.experimental import topologies

    compile_only()
    name = SLICES.get(topology, topology)
    if name not in SLICES.values():
        raise UserError(f"--{flag}={topology}: unknown; the known ones are {', '.join(SLICES)}, and shapes as v3:8x16")
    # JAX drives both cores of a v4 chip as one device.
    extra: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if name.endswith(":1x1"):  # libtpu before 0.0.50 takes four chips a host otherwise
        extra["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices
    except Exception as e:
        raise UserError(
            f"--{flag}={topology}: libtpu cannot make it ({first_line(e)}); is libtpu installed "
            "(pip install -e '.[preflight]')?"
        ) from None
