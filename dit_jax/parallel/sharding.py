"""The device mesh, and the rules that lay out parameters and activations on it.

Axes of the mesh: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits attention heads,
MLP units, and tokens between the sublayers of a block. RULES say which dimension of a parameter `tensor` splits. `fsdp`
then splits the first dimension that it divides, but never the axis of the stacked blocks. Optimizer moments and EMA
have the layout of their parameters.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from dit_jax.parallel.chips import Devices
from dit_jax.runtime.errors import UserError

BATCH = P(("data", "fsdp"))

# The first match wins. A path without a match is an error. None: `tensor` does not split the parameter.
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
    (r"(x_embedder|[th]_embedder/fc[12]|final_layer/(linear|adaLN_modulation))/(kernel|bias)$", None),
    (r"final_layer/norm/(bias|scale)$", None),
    (r"(pos_embed|y_embedder/embedding)$", None),
    (r"(^|/)(step|count|ns_coeffs)$", None),  # the last: of Muon's iteration, three numbers
]
# A parameter with fewer elements is cheaper to keep whole than to gather.
FSDP_MIN_SIZE = 2**14

# The mesh axes that split a dimension of an activation, by the name that the models give to the dimension.
AXES = {
    "batch": ("data", "fsdp"),
    "tokens": "tensor",  # between the sublayers of a block: norms and residual sums
    "heads": "tensor",
    "units": "tensor",
    "replica": "data",  # the batch, where `fsdp` splits "width"
    "width": "fsdp",
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Devices | None = None) -> Mesh:
    """Returns a mesh over the devices (default: all). One size may be -1: the devices that are left.

    Raises UserError if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh {sizes}: sizes must be positive, and one at most may be -1")
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise UserError(f"mesh {sizes} does not make {len(devices)} device(s)")
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=(AxisType.Auto,) * 3)


def data_mesh(mesh: Mesh) -> Mesh:
    """Returns a mesh over the same devices, in the same order, on which each has examples of its own."""
    return Mesh(mesh.devices.reshape(-1, 1, 1), mesh.axis_names, axis_types=mesh.axis_types)


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the path of a leaf of a tree (of jax.tree_util) as a name: "blocks/attn/qkv/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the PartitionSpec of a parameter, moment or scalar, by its path.

    Raises UserError if no rule matches, or if `tensor` does not divide the dimension that it has to split.
    """
    matches = [rule for pattern, rule in RULES if re.search(pattern, name)]
    if not matches:
        raise UserError(f"no sharding rule matches the parameter {name!r} {tuple(shape)}")
    rule = matches[0] or ()
    spec: list[Any] = [*rule, *[None] * (len(shape) - len(rule))]
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for i, axis in enumerate(spec):
        if axis == "tensor" and shape[i] % tensor:
            raise UserError(f"mesh.tensor={tensor} does not divide dimension {i} of {name} {tuple(shape)}")
    stacked = "blocks/" in name
    if fsdp > 1 and np.prod(shape[stacked:]) >= FSDP_MIN_SIZE:
        # The first dimension that it divides: after a gather along a later one the array must also be transposed.
        for i in range(stacked, len(shape)):
            if shape[i] % (fsdp * (tensor if spec[i] else 1)) == 0:
                spec[i] = ("tensor", "fsdp") if spec[i] else "fsdp"
                break
    return P(*spec)


@dataclass(frozen=True)
class MeshSharding:
    """The models.blocks.Sharding of a mesh. Raises UserError if `tensor` does not divide the heads."""

    mesh: Mesh
    num_heads: int

    def __post_init__(self):
        if self.num_heads % self.mesh.shape["tensor"]:
            raise UserError(f"mesh.tensor={self.mesh.shape['tensor']} does not divide the {self.num_heads} heads")

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Returns x laid out on the mesh.

        axes: for each dimension a key of AXES, or None. A dimension that its axes do not divide stays whole.
        """
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._spec(x.shape, axes)))

    def map_heads(self, function: Callable[..., Array], *arrays: Array) -> Array:
        """Returns function(*arrays), each device computing its examples and heads.

        Arrays and result: (B, H, ...). A number of examples that the mesh does not divide stays whole.
        """
        if self.mesh.size == 1:
            return function(*arrays)
        spec = self._spec(arrays[0].shape[:2], ("batch", "heads"))
        return jax.shard_map(function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arrays)

    def _spec(self, shape, axes):
        spec: list[Any] = [AXES[axis] if axis else None for axis in axes]
        for i, (axis, size) in enumerate(zip(spec, shape)):
            if axis and size % np.prod([self.mesh.shape[a] for a in np.atleast_1d(axis)]):
                spec[i] = None
        return P(*spec)

    def gather_weights(self, params: Any, dtype: DTypeLike) -> Any:
        """Returns the parameters of one block with kernels cast to dtype and gathered over `fsdp`.

        The cast comes first, so that the smaller type travels. Gradients are scattered as soon as they are computed.
        The kernel of adaLN stays split: its input has one row an example, and travels instead.
        """
        if self.mesh.shape["fsdp"] == 1:
            return params

        def constrained(leaf, spec):
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, P(*spec)))

        def gather(path, leaf):
            name = path_name(path)
            if not name.endswith("kernel"):
                return leaf
            split = spec_of(f"blocks/{name}", (1, *leaf.shape), self.mesh)[1:]
            leaf = constrained(leaf.astype(dtype), split)
            if name.startswith("adaLN_modulation"):
                return leaf
            # Without the barrier XLA gathers the slice before it drops the stacked axis of size 1, which a TPU pads.
            leaf = jax.lax.optimization_barrier(leaf)
            return constrained(leaf, ["tensor" if "tensor" in np.atleast_1d(axes) else None for axes in split])

        return jax.tree_util.tree_map_with_path(gather, params)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Returns the NamedShardings of a tree of arrays or shapes, as a tree."""

    def sharding(path, leaf):
        return NamedSharding(mesh, spec_of(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def abstract_arrays(shapes: Any, mesh: Mesh) -> Any:
    """Returns a tree of arrays or shapes as jax.ShapeDtypeStructs with their shardings on the mesh."""

    def abstract(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, shapes, state_shardings(shapes, mesh))


def shardings_of(tree: Any) -> Any:
    """Returns the shardings of a tree of arrays, or of ShapeDtypeStructs with shardings, as a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def bytes_on_a_device(tree: Any) -> int:
    """Returns the bytes that a tree of arrays, or of ShapeDtypeStructs with shardings, takes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in leaves)


def put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns a NumPy array, which every host has whole, as a jax.Array with this sharding."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def on_each_device(function: Callable[..., Any], *specs: Any, mesh: Mesh) -> Callable[..., Any]:
    """Returns the function as one that each device runs on its share of a batch, over all axes of the mesh.

    specs: the PartitionSpecs of its arguments.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(mesh.axis_names), check_vma=False)


def over_devices(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Returns function(params, batch) as a jitted function that each device runs on its share of the batch.

    The program is the same on any number of devices. The result is whole on every device.
    """
    mapped = on_each_device(function, P(), P(mesh.axis_names), mesh=mesh)
    return jax.jit(mapped, out_shardings=replicated(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch: split over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def split_parts(x: Array, parts: int, mesh: Mesh) -> Array:
    """Returns an array over a batch, (B, ...), as (parts, B / parts, ...), each part laid out as a batch.

    Every device splits its own examples, so nothing travels: a part holds a few examples of each device, not
    consecutive ones of the batch. parts: divides B / batch_shards(mesh).
    """
    shards = batch_shards(mesh)
    x = x.reshape(shards, parts, len(x) // shards // parts, *x.shape[1:]).swapaxes(0, 1)
    x = x.reshape(parts, -1, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *BATCH)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The layout of an array that is whole on every device."""
    return NamedSharding(mesh, P())


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that the batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
