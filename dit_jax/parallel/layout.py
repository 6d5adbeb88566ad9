"""Decides for the devices what a config leaves open: mesh, compute dtype, remat, scan. Estimates the memory of a run.

The estimates count the parameters of a block in squares of its width: 12 in attention and MLP, 6 in adaLN-Zero.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.parallel.chips import CHIPS, GIB, GPUS, Devices, has_bfloat16
from dit_jax.runtime.arrays import host_memory
from dit_jax.runtime.errors import UserError

# {remat: bytes that the backward pass keeps of each block, (for each token and channel, for each attention weight)}.
# Fitted to what preflight reports of DiT-XL/2 at 256 and 512 px.
KEPT_BYTES = {"none": (36, 2), "dots": (22, 0), "full": (2, 0)}
FEATURE_BYTES = 4 * (2048 + 1008)  # what evaluation keeps of each image


def training_memory(config: dict[str, Any], num_devices: int, remat: str) -> float:
    """Returns an estimate of the bytes that training takes on one device: the state, and the activations of its tokens.

    config: resolved, with its mesh decided.
    """
    model, mesh = config["model"], config["mesh"]
    depth, width = model["depth"], model["hidden_size"]
    tokens = (model["input_size"] // model["patch_size"]) ** 2
    tokens_per_device = config["batch_size"] * tokens / num_devices
    # 4 bytes a parameter: float32 parameters, EMA, two moments, and the averages of config.average.
    copies = 4 + (2 if config.get("average", {}).get("every") else 0)
    state = 4 * copies * 18 * depth * width**2 / (mesh["fsdp"] * mesh["tensor"])
    return state + tokens_per_device * _token_bytes(model, tokens, depth, remat)


def _token_bytes(model, tokens, depth, remat):
    """Bytes of one token's activations in bfloat16: what is kept of `depth` blocks, and the arrays of one at work."""
    per_channel, per_weight = KEPT_BYTES[remat]
    return (per_channel * depth + 60) * model["hidden_size"] + (per_weight * depth + 8) * model["num_heads"] * tokens


def least_memory(
    model: dict[str, Any],
    training: int | None = None,
    remat: str = "full",
    pictures: dict[str, int] | None = None,
    averages: int = 0,
) -> dict[str, int]:
    """Returns {setting: bytes}: the least memory that each setting takes, over all devices and on any mesh.

    model: config.model, or the arguments of models.dit.DiT. training: the examples of a training step, or None. remat:
    of the training step. pictures: {setting: images that go through the network at once in sampling}. averages: further
    copies of the parameters in the training state.
    """
    depth, width, patch = model["depth"], model["hidden_size"], model["patch_size"]
    size, channels, num_classes = model["input_size"], model["in_channels"], model["num_classes"]
    tokens = (size // patch) ** 2
    kernels = 12 + {"adaln_zero": 6, "adaln": 4, "cross_attention": 4}.get(model["block"], 0)
    # float32 parameters; in training also EMA, two moments and gradients.
    parameter = 4 * (5 + averages if training else 1)
    needs = {
        f"depth={depth} and hidden_size={width}": parameter * kernels * depth * width**2,
        f"num_classes={num_classes}": parameter * (num_classes + 1) * width,
        f"input_size={size} and in_channels={channels}": parameter * (tokens + 2 * patch**2 * channels) * width,
    }
    image = 8 * size**2 * channels  # two float32 arrays: the images and their noise
    if training:
        needs[f"batch_size={training}"] = training * (image + tokens * _token_bytes(model, tokens, depth, remat))
    for setting, count in (pictures or {}).items():
        needs[setting] = count * (image + tokens * _token_bytes(model, tokens, 0, "full"))
    return needs


def memory_of(devices: Devices) -> float:
    """Returns the bytes that a program over these devices can have, over all of them; infinity if unknown.

    On CPU it is the memory of the machine, or the limit of its control group, for each process. On GPU it is what the
    device says that JAX may take of it.
    """
    if devices[0].platform == "cpu":
        return host_memory() * jax.process_count()
    kind = devices[0].device_kind
    if kind in CHIPS:
        return len(devices) * CHIPS[kind].hbm
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", GPUS[kind].hbm if kind in GPUS else math.inf)
    return len(devices) * limit


def whole_weights_fit(model: dict[str, Any], devices: Devices, images: int, weights: int, held: int) -> bool:
    """Returns whether each device can hold all weights of a network, in their compute dtype, while it samples.

    Then no step moves weights between devices. On CPU, where devices share one memory, the answer is no.

    model: the arguments of models.dit.DiT. images: how many are sampled at once, over all devices. weights: bytes.
    held: bytes of one device that are taken already.
    """
    if devices[0].platform == "cpu":
        return False
    tokens = (model["input_size"] // model["patch_size"]) ** 2
    image = 8 * model["input_size"] ** 2 * model["in_channels"]  # two float32 arrays: the image and its noise
    guided = 2  # guidance doubles the batch
    images_per_device = -(-images // len(devices))
    at_work = images_per_device * guided * (image + tokens * _token_bytes(model, tokens, 0, "full"))
    return held + weights + at_work < 0.9 * memory_of(devices) / len(devices)


def check_memory(needs: dict[str, int], devices: Devices) -> None:
    """Raises UserError naming the largest of `needs`, {setting: bytes}, if the devices lack the memory for all."""
    available, total = memory_of(devices), sum(needs.values())
    if total > available:
        setting = max(needs, key=lambda setting: needs[setting])
        raise UserError(
            f"{setting}: needs at least {_gib(needs[setting])} of memory, {_gib(total)} with everything else, and the "
            f"devices have {_gib(available)} together: use a smaller value"
        )


def _gib(count):
    return f"{count / GIB:,.3g} GiB" if count < 1e6 * GIB else f"{count / GIB:.1e} GiB"


def _auto_mesh(num_devices, batch_size, num_heads):
    """Returns the sizes of (data, fsdp, tensor) for a TPU slice, or for GPUs.

    With few examples a device most of the traffic is weights. `tensor` then shares a layer among as many devices as
    have 4 examples together. `fsdp` shares the state among up to 16 devices: the rows of a kernel still fill whole
    tiles of a TPU's memory.
    """
    tensor = 1
    while batch_size * tensor < 4 * num_devices and num_devices % (2 * tensor) == 0 and num_heads % (2 * tensor) == 0:
        tensor *= 2
    fsdp = 1
    while fsdp < 16 and (num_devices // tensor) % (2 * fsdp) == 0:
        fsdp *= 2
    return {"data": num_devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}


def compute_dtype(devices: Devices) -> np.dtype:
    """Returns the dtype of matrix products and activations: bfloat16 where the chip has it, else float32."""
    return np.dtype(jnp.bfloat16 if has_bfloat16(devices[0]) else np.float32)


def resolve_auto(config: dict[str, Any], devices: Devices) -> dict[str, Any]:
    """Returns a resolved config with every "auto" and every unset field decided for these devices, of one kind."""
    model, mesh = dict(config["model"]), dict(config["mesh"])
    on_cpu = devices[0].platform == "cpu"
    if model["dtype"] == "auto":
        model["dtype"] = compute_dtype(devices).name
    if not on_cpu and mesh["fsdp"] is None and mesh["tensor"] is None and mesh["data"] == -1:
        mesh = _auto_mesh(len(devices), config["batch_size"], model["num_heads"])
    mesh = {axis: 1 if size is None else size for axis, size in mesh.items()}
    config = config | {"model": model, "mesh": mesh}
    if model["remat"] == "auto":
        model["remat"] = _remat(config, devices)
    if model["scan"] is None:
        # Unrolled, the program of a TPU or a GPU takes less memory and moves fewer bytes: S/2's step at batch 32,
        # compiled for an H100, 2.5 GiB and 20 GB, and 3.0 and 34 as a loop. On CPU it only compiles longer.
        model["scan"] = on_cpu
    return config


def _remat(config, devices):
    """Returns the policy that recomputes the least and fits the memory."""
    # On CPU the fusions of the backward pass recompute even what is kept. Recomputing it once halves the step.
    if devices[0].platform == "cpu":
        return "dots"
    n, memory = len(devices), memory_of(devices) / len(devices)
    return next((r for r in ("none", "dots") if training_memory(config, n, r) < 0.9 * memory), "full")
