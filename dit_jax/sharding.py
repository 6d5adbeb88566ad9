"""The mesh and the rules from a parameter's path to its PartitionSpec.

Axes: `data` (the batch alone), `fsdp` (the batch and the parameters), `tensor` (heads and MLP units). The rules say
where `tensor` goes; `fsdp` then takes the largest free dimension that it divides, never the stacked blocks' axis.
Moments and EMA lie as their parameters do.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

BATCH = P(("data", "fsdp"))

# First match wins; a path that nothing matches is an error. None: not split by `tensor`.
RULES = [
    (r"blocks/.*(qkv|kv)/kernel$", P(None, None, None, "tensor", None)),  # (L, D, 3 or 2, H, K)
    (r"blocks/.*(qkv|kv)/bias$", P(None, None, "tensor", None)),
    (r"blocks/cross_attn/q/kernel$", P(None, None, "tensor", None)),  # (L, D, H, K)
    (r"blocks/cross_attn/q/bias$", P(None, "tensor", None)),
    (r"blocks/(attn|cross_attn)/proj/kernel$", P(None, "tensor", None, None)),  # (L, H, K, D)
    (r"blocks/mlp/fc1/kernel$", P(None, None, "tensor")),  # (L, D, 4D)
    (r"blocks/mlp/fc1/bias$", P(None, "tensor")),
    (r"blocks/mlp/fc2/kernel$", P(None, "tensor", None)),  # (L, 4D, D)
    (r"blocks/adaLN_modulation/kernel$", None),
    (r"blocks/.*(bias|scale)$", None),
    (r"(x_embedder|t_embedder/fc[12]|final_layer/(linear|adaLN_modulation))/(kernel|bias)$", None),
    (r"final_layer/norm/(bias|scale)$", None),
    (r"(pos_embed|y_embedder/embedding)$", None),
    (r"(^|/)(step|count)$", None),
]
# Below this many elements a parameter is cheaper to keep whole than to gather.
FSDP_MIN_SIZE = 2**14


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None):
    """A mesh over all devices; one size may be -1. Raises ValueError where the sizes do not make the devices."""
    devices = jax.devices() if devices is None else devices
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {sizes}: sizes are positive, and one at most is -1")
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise ValueError(f"mesh {sizes} does not make {len(devices)} device(s)")
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=(AxisType.Auto,) * 3)


def path_name(path):
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec_of(name, shape, mesh):
    """The PartitionSpec of the parameter (or moment, or scalar) `name`."""
    for pattern, rule in RULES:
        if re.search(pattern, name):
            break
    else:
        raise ValueError(f"no sharding rule matches the parameter {name!r} {tuple(shape)}")
    spec = list(rule or ()) + [None] * (len(shape) - len(rule or ()))
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for i, axis in enumerate(spec):
        if axis == "tensor" and shape[i] % tensor:
            raise ValueError(f"mesh.tensor={tensor} does not divide dimension {i} of {name} {tuple(shape)}")
    if fsdp > 1 and np.prod(shape) >= FSDP_MIN_SIZE:
        free = [i for i in range(len(shape)) if spec[i] is None and shape[i] % fsdp == 0
                and not (i == 0 and "blocks/" in name)]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return P(*spec)


def state_shardings(state, mesh):
    """A tree of arrays or shapes -> the same tree of NamedShardings."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh)), state)


def batch_sharding(mesh):
    return NamedSharding(mesh, BATCH)


def replicated(mesh):
    return NamedSharding(mesh, P())


def batch_shards(mesh):
    """Into how many parts the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
