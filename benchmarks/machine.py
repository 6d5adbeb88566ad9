"""What a page says of the machine and the code that its numbers come from."""

import os
import platform
import subprocess
from importlib import metadata

from benchmarks import ROOT

PACKAGES = "jax", "jaxlib", "flax", "numpy", "scipy", "torch", "diffusers"


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS lacks it


def machine(packages=PACKAGES):
    """The processor, its cores, the system and the versions of Python and of these packages, as plain values."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            text = f.read()
        names = (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
        cpu = next(names, cpu)
        # Virtual machines of one name differ in this, and their matrix rates then differ by 3 times.
        cpu += next((f" with {name}" for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in text), "")
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    versions = {name: installed.get(name) for name in packages}
    return {
        "cpu": cpu,
        "cores": cores(),
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), **versions},
    }


def commit():
    """The commit of the code as git names it, with "-dirty" where files have changed since; None without git."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, capture_output=True)
    except OSError:
        return None
    return found.stdout.strip() or None
