"""Decides for the devices what a config leaves open: mesh, compute dtype, attention, remat, parts of a batch, scan.

It also estimates the memory of a run. The estimates count the parameters of a block in squares of its width: 12 in
attention and MLP, 6 in adaLN-Zero.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.parallel.chips import CHIPS, GIB, GPUS, Devices, has_bfloat16
from dit_jax.runtime.arrays import host_memory
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say

# {remat: bytes that the backward pass keeps of each block, (for each token and channel, for each attention weight)}.
# Fitted to what preflight reports of DiT-XL/2 at 256 and 512 px.
KEPT_BYTES = {"none": (36, 2), "dots": (22, 0), "full": (2, 0)}
# A device with whole weights has no collective that hurries the gradients of unrolled kernels. XLA makes them late and
# keeps what they are made of: bytes for each token, channel and block, (in one pass, in parts). From the same reports.
LATE_BYTES = (32, 10)
# The activations that a part of a batch may have on CPU, at most: larger parts take more memory and no less time.
PART_BYTES = GIB
# The same where a kernel runs the attention: no weights leave the chip, and no head is padded to 128 channels.
KERNEL_KEPT_BYTES = {"none": (24, 0), "dots": (22, 0), "full": (2, 0)}
# What each kernel of models.attention needs.
KERNELS = {
    "pallas": "TPU v4 and later, in bfloat16",
    "cudnn": "NVIDIA GPUs of compute capability 8 and later, in bfloat16, with heads that 8 divides, 128 wide at most",
}
# The tokens for which "auto" takes a kernel. 256 are the fewest for which preflight was seen to count fewer bytes. Ours
# is unrolled over the tokens: with 4,096 its backward pass alone takes half a minute to compile.
KERNEL_TOKENS = {"pallas": range(256, 2049), "cudnn": range(256, 2**31)}
FEATURE_BYTES = 4 * (2048 + 1008)  # what evaluation keeps of each image


def training_memory(config: dict[str, Any], num_devices: int, remat: str, parts: int) -> float:
    """Returns an estimate of the bytes that training takes on one device: the state, and the activations of its tokens.

    config: resolved, with its mesh decided. parts: of a batch.
    """
    model, mesh = config["model"], config["mesh"]
    # 4 bytes a parameter: float32 parameters, EMA, two moments, and the averages of config.average.
    copies = 4 + (2 if config.get("average", {}).get("every") else 0)
    if config.get("optimizer", {}).get("name") == "muon":
        copies -= 1  # kernels have one moment
    if parts > 1:
        copies += 2 if model["scan"] else 1  # the sum of the gradients, and those of a part (training/accumulate.py)
    state = 4 * copies * 18 * model["depth"] * model["hidden_size"] ** 2 / (mesh["fsdp"] * mesh["tensor"])
    alone = mesh["fsdp"] * mesh["tensor"] == 1 and not model["scan"]
    return state + _activations(config, remat, parts, LATE_BYTES[parts > 1] if alone else 0) / num_devices


def _activations(config, remat, parts, least=0):
    """Bytes of the activations of a part of a batch, over all devices. least: kept of each block, as in KEPT_BYTES."""
    model = config["model"]
    tokens = (model["input_size"] // model["patch_size"]) ** 2
    examples = config["batch_size"] / parts * (2 if model["dtype"] == "float32" else 1)
    return examples * tokens * _token_bytes(model, tokens, model["depth"], remat, least)


def _token_bytes(model, tokens, depth, remat, least=0):
    """Bytes of one token's activations in bfloat16: what is kept of `depth` blocks, and the arrays of one at work."""
    kernel = model.get("attention", "xla") != "xla"
    per_channel, per_weight = (KERNEL_KEPT_BYTES if kernel else KEPT_BYTES)[remat]
    per_channel, weights = max(per_channel, least), per_weight * depth + (0 if kernel else 8)
    return (per_channel * depth + 60) * model["hidden_size"] + weights * model["num_heads"] * tokens


def least_memory(
    model: dict[str, Any],
    training: int | None = None,
    remat: str = "full",
    parts: int = 1,
    pictures: dict[str, int] | None = None,
    averages: int = 0,
) -> dict[str, int]:
    """Returns {setting: bytes}: the least memory that each setting takes, over all devices and on any mesh.

    model: config.model, or the arguments of models.dit.DiT. training: the examples of a training step, or None. remat,
    parts: of the training step. pictures: {setting: images that go through the network at once in sampling}. averages:
    further copies of the parameters in the training state.
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
        setting = f"batch_size={training}" + (f" with accumulate={parts}" if parts > 1 else "")
        needs[setting] = training * (image + tokens * _token_bytes(model, tokens, depth, remat) // parts)
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


def choose_attention(model: dict[str, Any], devices: Devices, objective: str = "ddpm") -> str:
    """Returns what runs self-attention, one of models.attention.ATTENTION.

    Prints a line if it is not what was asked for.

    model: config.model, or the arguments of models.dit.DiT, with its dtype decided. Its `attention` may be missing.
    """
    asked, device = model.get("attention", "auto"), devices[0]
    if asked in KERNELS and not _runs(asked, model, device):
        say(f"model.attention={asked}: is for {KERNELS[asked]}; XLA's is used")
        return "xla"
    if asked != "auto":
        return asked
    tokens = (model["input_size"] // model["patch_size"]) ** 2
    kernel = next((name for name in KERNELS if tokens in KERNEL_TOKENS[name] and _runs(name, model, device)), "xla")
    if objective == "meanflow" and kernel != "xla":
        say("model.attention=auto: XLA's is used, because objective=meanflow needs forward mode")
        return "xla"
    return kernel


def _runs(kernel, model, device):
    """Whether a device runs a kernel of KERNELS."""
    if np.dtype(model["dtype"]) != jnp.bfloat16:
        return False
    if kernel == "pallas":
        return device.platform == "tpu" and device.device_kind not in ("TPU v2", "TPU v3")
    width, nvidia = (
        model["hidden_size"] // model["num_heads"],
        device.platform == "gpu" and "NVIDIA" in device.device_kind,
    )
    return nvidia and float(device.compute_capability) >= 8 and width % 8 == 0 and width <= 128


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
    model["attention"] = choose_attention(model, devices, config.get("objective", "ddpm"))
    if model["scan"] is None:
        # Unrolled, the program of a TPU or a GPU takes less memory and moves fewer bytes: S/2's step at batch 32,
        # compiled for an H100, 2.5 GiB and 20 GB, and 3.0 and 34 as a loop. On CPU it only compiles longer.
        model["scan"] = on_cpu
    config["accumulate"], model["remat"] = _parts_and_remat(config, devices)
    return config


def _parts_and_remat(config, devices):
    """Returns (parts of a batch, remat) where config leaves them open: the fewest parts that fit the memory, and with
    them what recomputes the least."""
    parts, policies = config.get("accumulate"), [config["model"]["remat"]]
    if policies == ["auto"]:
        # On CPU the fusions of the backward pass recompute even what is kept. Recomputing it once halves the step.
        policies = ["dots"] if devices[0].platform == "cpu" else ["none", "dots", "full"]
    sizes = config["mesh"]
    rest = len(devices) // math.prod(size for size in sizes.values() if size > 0)
    config = config | {"mesh": {axis: size if size > 0 else max(1, rest) for axis, size in sizes.items()}}
    share = max(1, config["batch_size"] * config["mesh"]["tensor"] // len(devices))  # the examples of a shard
    counts = [parts] if parts else [n for n in range(1, share + 1) if share % n == 0]
    choices = [(n, remat) for n in counts for remat in policies]
    return next((choice for choice in choices if _fits(config, devices, *choice)), choices[-1])


def _fits(config, devices, parts, remat):
    if devices[0].platform == "cpu":
        return _activations(config, remat, parts) < min(PART_BYTES, memory_of(devices) / 16)
    memory = memory_of(devices) / len(devices)
    return training_memory(config, len(devices), remat, parts) < 0.9 * memory
