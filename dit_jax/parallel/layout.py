"""How a run is laid out on its devices where the config does not say: mesh, compute dtype, loop or unrolled blocks, what
the backward pass recomputes. And the memory that this takes."""

import contextlib
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.parallel.chips import CHIPS, GIB
from dit_jax.runtime.errors import UserError

# Bytes that the backward pass keeps of each block: for each token and channel, and for each attention weight. Fitted to
# what preflight reports of DiT-XL/2 at 256 and 512 px.
KEPT = {"none": (36, 2), "dots": (22, 0), "full": (2, 0)}


def memory(config, devices, remat):
    """An estimate of the bytes a device that training takes: the state, what is kept of every block, and the arrays of
    the one block at work."""
    model, mesh = config["model"], config["mesh"]
    depth, width = model["depth"], model["hidden_size"]
    tokens = (model["input_size"] // model["patch_size"]) ** 2
    rows = config["batch_size"] * tokens / devices
    state = 16 * 18 * depth * width**2 / (mesh["fsdp"] * mesh["tensor"])
    return state + rows * _kept(model, tokens, depth, remat)


def _kept(model, tokens, depth, remat):
    """Bytes of a token, in bfloat16: what is kept of `depth` blocks, and the arrays of the one at work."""
    channel, weight = KEPT[remat]
    return (channel * depth + 60) * model["hidden_size"] + (weight * depth + 8) * model["num_heads"] * tokens


FEATURES = 4 * (2048 + 1008)  # bytes that evaluation keeps of a picture


def least_memory(model, training=None, remat="full", pictures=None):
    """{setting: bytes}, what this takes at least, whatever the mesh.

    model: config.model, or the arguments of models.dit.DiT. training: the pictures of a training step, or None; remat: what
    its backward pass recomputes. pictures: {setting: how many go through the network at once in sampling}.
    """
    depth, width, patch, size, channels = (
        model[key] for key in ("depth", "hidden_size", "patch_size", "input_size", "in_channels"))
    tokens = (size // patch) ** 2
    copies = 4 * (5 if training else 1)  # float32: with the EMA, two moments and the gradients, or alone
    kernels = 12 + {"adaln_zero": 6, "adaln": 4, "cross_attention": 4}.get(model["block"], 0)
    needs = {f"depth={depth} and hidden_size={width}": copies * kernels * depth * width**2,
             f"num_classes={model['num_classes']}": copies * (model["num_classes"] + 1) * width,
             f"input_size={size} and in_channels={channels}": copies * (tokens + 2 * patch**2 * channels) * width}
    if training:
        needs[f"batch_size={training}"] = training * (8 * size**2 * channels + tokens * _kept(model, tokens, depth, remat))
    for setting, count in (pictures or {}).items():
        needs[setting] = count * (8 * size**2 * channels + tokens * _kept(model, tokens, 0, "full"))
    return needs


def memory_of(devices):
    """Bytes of memory that a program over all these devices can have."""
    if devices[0].platform == "cpu":
        memory, groups = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "/sys/fs/cgroup"
        limits = [f"{groups}/memory/memory.limit_in_bytes", f"{groups}/memory.max"]
        with contextlib.suppress(OSError), open("/proc/self/cgroup") as f:
            limits += [f"{groups}{line.strip()[3:]}/memory.max" for line in f if line.startswith("0::")]
        for limit in limits:
            with contextlib.suppress(OSError, ValueError), open(limit) as f:
                memory = min(memory, int(f.read()))
        return memory * jax.process_count()
    chip = CHIPS.get(devices[0].device_kind)
    return len(devices) * (chip.hbm if chip else (devices[0].memory_stats() or {}).get("bytes_limit", math.inf))


def check_memory(needs, devices):
    """UserError naming the largest of `needs`, {setting: bytes}, where the devices have not the memory for all."""
    there, total = memory_of(devices), sum(needs.values())
    if total > there:
        setting = max(needs, key=needs.get)
        raise UserError(f"{setting}: needs {_gib(needs[setting])} of memory at least, {_gib(total)} with all else, and there "
                         f"are {_gib(there)} in all: set less")


def _gib(count):
    return f"{count / GIB:,.3g} GiB" if count < 1e6 * GIB else f"{count / GIB:.1e} GiB"


def _mesh(devices, batch_size, num_heads):
    """Sizes of (data, fsdp, tensor). With few examples a device the weights are the traffic: `tensor` then shares a
    layer among as many devices as bring 4 examples together; `fsdp` shares the state among up to 16, whose rows of a
    kernel still fill whole tiles of a TPU's memory."""
    tensor = 1
    while (batch_size * tensor < 4 * devices and devices % (2 * tensor) == 0 and num_heads % (2 * tensor) == 0):
        tensor *= 2
    fsdp = 1
    while fsdp < 16 and (devices // tensor) % (2 * fsdp) == 0:
        fsdp *= 2
    return {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


def compute_dtype(devices):
    return np.dtype(jnp.bfloat16 if devices[0].device_kind in CHIPS else np.float32)


def resolve_auto(config, devices):
    """A resolved config -> the same with every "auto" decided for these devices (jax.Device of one kind)."""
    model, mesh = dict(config["model"]), dict(config["mesh"])
    chip = CHIPS.get(devices[0].device_kind)
    if model["dtype"] == "auto":
        model["dtype"] = compute_dtype(devices).name
    if mesh["fsdp"] is None and mesh["tensor"] is None and mesh["data"] == -1:
        mesh = _mesh(len(devices), config["batch_size"], model["num_heads"]) if chip else mesh
    mesh = {axis: 1 if size is None else size for axis, size in mesh.items()}
    config = config | {"model": model, "mesh": mesh}
    if model["remat"] == "auto" and chip:
        fits = (policy for policy in ("none", "dots") if memory(config, len(devices), policy) < 0.9 * chip.hbm)
        model["remat"] = next(fits, "full")
    elif model["remat"] == "auto":
        # On CPU the backward pass's fusions recompute what is kept anyway; recomputing it once halves the step.
        model["remat"] = "dots" if devices[0].platform == "cpu" else "none"
    if model["scan"] is None:
        # Unrolled, a TPU's program takes less memory and moves fewer bytes; elsewhere it is only longer to compile.
        model["scan"] = not chip
    return config
