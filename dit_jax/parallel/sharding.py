"""The mesh and the rules from a parameter's path to its PartitionSpec.

Axes: `data` (the batch alone), `fsdp` (the batch and the parameters), `tensor` (heads, MLP units, and tokens between
the blocks' products). The rules say where `tensor` goes; `fsdp` then takes the first dimension that it divides, never
the stacked blocks' axis. Moments and EMA lie as their parameters do.
"""

import re
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from dit_jax.runtime.errors import UserError

BATCH = P(("data", "fsdp"))

# First match wins; a path that nothing matches is an error. None: not split by `tensor`.
RULES = [
    (r"blocks/.*(qkv|kv|q)/kernel$", P(None, None, "tensor")),  # (L, D, 3D, 2D or D), columns head by head
    (r"blocks/.*(qkv|kv|q)/bias$", P(None, "tensor")),
    (r"blocks/(attn|cross_attn)/proj/kernel$", P(None, "tensor", None)),  # (L, D, D), rows head by head
    (r"blocks/mlp/fc1/kernel$", P(None, None, "tensor")),  # (L, D, 4D)
    (r"blocks/mlp/fc1/bias$", P(None, "tensor")),
    (r"blocks/mlp/fc2/kernel$", P(None, "tensor", None)),  # (L, 4D, D)
    (r"blocks/adaLN_modulation/kernel$", P(None, None, "tensor")),  # (L, D, 6D)
    (r"blocks/adaLN_modulation/bias$", P(None, "tensor")),
    (r"blocks/.*(bias|scale)$", None),
    (r"(x_embedder|t_embedder/fc[12]|final_layer/(linear|adaLN_modulation))/(kernel|bias)$", None),
    (r"final_layer/norm/(bias|scale)$", None),
    (r"(pos_embed|y_embedder/embedding)$", None),
    (r"(^|/)(step|count)$", None),
]
# Below this many elements a parameter is cheaper to keep whole than to gather.
FSDP_MIN_SIZE = 2**14


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None):
    """A mesh over all devices; one size may be -1. Raises UserError where the sizes do not make the devices."""
    devices = jax.devices() if devices is None else devices
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh {sizes}: sizes are positive, and one at most is -1")
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise UserError(f"mesh {sizes} does not make {len(devices)} device(s)")
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
        raise UserError(f"no sharding rule matches the parameter {name!r} {tuple(shape)}")
    spec = list(rule or ()) + [None] * (len(shape) - len(rule or ()))
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for i, axis in enumerate(spec):
        if axis == "tensor" and shape[i] % tensor:
            raise UserError(f"mesh.tensor={tensor} does not divide dimension {i} of {name} {tuple(shape)}")
    stacked = "blocks/" in name
    if fsdp > 1 and np.prod(shape[stacked:]) >= FSDP_MIN_SIZE:
        # The first dimension that divides: what is gathered along a later one has to be transposed as well.
        for i in range(stacked, len(shape)):
            if shape[i] % (fsdp * (tensor if spec[i] else 1)) == 0:
                spec[i] = ("tensor", "fsdp") if spec[i] else "fsdp"
                break
    return P(*spec)


# Where the dimensions of activations lie, by the names that the models give them.
AXES = {
    "batch": ("data", "fsdp"),
    "tokens": "tensor",  # between the blocks' products: norms, residuals
    "heads": "tensor",
    "units": "tensor",
    "replica": "data",  # the batch, where "width" takes the fsdp axis
    "width": "fsdp",
}


@dataclass(frozen=True)
class MeshSharding:
    """What models.blocks.NoSharding describes, over a mesh."""
    mesh: Mesh
    num_heads: int

    def __post_init__(self):
        if self.num_heads % self.mesh.shape["tensor"]:
            raise UserError(f"mesh.tensor={self.mesh.shape['tensor']} does not divide the {self.num_heads} heads")

    def constrain(self, x, *axes):
        """x laid out on the mesh, its dimensions named by AXES. A dimension that its axes do not divide stays whole."""
        if self.mesh.size == 1:
            return x
        spec = [AXES.get(axis) for axis in axes]
        for i, (axis, size) in enumerate(zip(spec, x.shape)):
            if axis and size % np.prod([self.mesh.shape[a] for a in np.atleast_1d(axis)]):
                spec[i] = None
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))

    def gather_weights(self, params, dtype):
        """Kernels are cast, then gathered over fsdp, so that the smaller type travels; their gradients are scattered
        as soon as they are there. adaLN's kernel stays split: its input has one row an example and travels instead."""
        if self.mesh.shape["fsdp"] == 1:
            return params

        def gather(path, leaf):
            name = path_name(path)
            if not name.endswith("kernel"):
                return leaf
            split = spec_of(f"blocks/{name}", (1, *leaf.shape), self.mesh)[1:]
            leaf = jax.lax.with_sharding_constraint(leaf.astype(dtype), NamedSharding(self.mesh, P(*split)))
            if name.startswith("adaLN_modulation"):
                return leaf
            # Without the barrier XLA gathers the slice before it drops the stacked axis of size 1, which a TPU pads.
            leaf = jax.lax.optimization_barrier(leaf)
            whole = ["tensor" if "tensor" in np.atleast_1d(axes) else None for axes in split]
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, P(*whole)))

        return jax.tree_util.tree_map_with_path(gather, params)


def state_shardings(state, mesh):
    """A tree of arrays or shapes -> the same tree of NamedShardings."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh)), state)


def abstract_arrays(shapes, mesh):
    """A tree of arrays or shapes -> the same tree of ShapeDtypeStructs with their shardings on the mesh."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes,
                        state_shardings(shapes, mesh))


def shardings_of(tree):
    """A tree of arrays, or of ShapeDtypeStructs with shardings -> the tree of their shardings."""
    return jax.tree.map(lambda a: a.sharding, tree)


def put(array, where):
    """A NumPy array that every host has whole -> a jax.Array of the sharding `where`."""
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)


def over_devices(function, mesh):
    """function(params, batch) jitted such that each device of the mesh runs the same program on its share of the batch;
    the result is whole on every device."""
    split = P(mesh.axis_names)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(P(), split), out_specs=split, check_vma=False)
    return jax.jit(mapped, out_shardings=replicated(mesh))


def batch_sharding(mesh):
    return NamedSharding(mesh, BATCH)


def replicated(mesh):
    return NamedSharding(mesh, P())


def batch_shards(mesh):
    """Into how many parts the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
