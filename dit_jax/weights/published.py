"""A DiT's arrays between the published code's names and layouts, and ours.

The published form is a flat mapping from names to float32 arrays. Ours is a nested dict; the arrays of the blocks are
stacked. Here `args` are the arguments of models.dit.DiT.
"""

import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float

from dit_jax.models.blocks import MLP_RATIO
from dit_jax.models.dit import SIZES
from dit_jax.runtime.arrays import aligned_empty
from dit_jax.runtime.errors import UserError

# Our path -> published name, in the published order. {} is the block's index.
NAMES = {
    "pos_embed": "pos_embed",
    "x_embedder": "x_embedder.proj",
    "t_embedder/fc1": "t_embedder.mlp.0",
    "t_embedder/fc2": "t_embedder.mlp.2",
    "h_embedder/fc1": "h_embedder.mlp.0",  # of a network with a second time only
    "h_embedder/fc2": "h_embedder.mlp.2",
    "y_embedder/embedding": "y_embedder.embedding_table.weight",
    "blocks/attn/qkv": "blocks.{}.attn.qkv",
    "blocks/attn/proj": "blocks.{}.attn.proj",
    "blocks/mlp/fc1": "blocks.{}.mlp.fc1",
    "blocks/mlp/fc2": "blocks.{}.mlp.fc2",
    "blocks/adaLN_modulation": "blocks.{}.adaLN_modulation.1",
    "final_layer/linear": "final_layer.linear",
    "final_layer/adaLN_modulation": "final_layer.adaLN_modulation.1",
}
SECOND_TIME = "h_embedder.mlp.0 and h_embedder.mlp.2"  # what errors call its arrays
HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}  # of the paper's models, by width


def _pairs(args: Mapping[str, Any]) -> Iterator[tuple[str, int | None, str]]:
    """(our path, block index or None, published name) of every array, in the published order."""
    names = NAMES
    if not args.get("second_time", False):
        names = {path: name for path, name in NAMES.items() if not path.startswith("h_embedder")}
    for block in [None, *range(args["depth"])]:
        for path, name in names.items():
            if path.startswith("blocks/") != (block is not None) or path.startswith("final_layer"):
                continue
            yield from _leaves(path, block, name.format(block))
    for path, name in names.items():
        if path.startswith("final_layer"):
            yield from _leaves(path, None, name)


def _leaves(path, block, name):
    if path in ("pos_embed", "y_embedder/embedding"):
        yield path, block, name
    else:
        yield f"{path}/kernel", block, f"{name}.weight"
        yield f"{path}/bias", block, f"{name}.bias"


def _to_ours(path, a, args):
    d, h = args["hidden_size"], args["num_heads"]
    if path == "pos_embed":
        return a[0]
    if path == "x_embedder/kernel":  # a convolution's (D, C, p, p) -> (p*p*C, D)
        return a.transpose(2, 3, 1, 0).reshape(-1, d)
    if path.startswith("blocks/attn/qkv/"):  # rows q|k|v, each of all heads -> columns of one head after another
        return rearrange(a, "(three h k) ... -> ... (h three k)", three=3, h=h)
    return a.T if path.endswith("kernel") else a


def _to_published(path, a, args):
    d, h, p = args["hidden_size"], args["num_heads"], args["patch_size"]
    if path == "pos_embed":
        return a[None]
    if path == "x_embedder/kernel":
        return a.reshape(p, p, -1, d).transpose(3, 2, 0, 1)
    if path.startswith("blocks/attn/qkv/"):
        return rearrange(a, "... (h three k) -> (three h k) ...", three=3, h=h)
    return a.T if path.endswith("kernel") else a


def published_shapes(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{published name: shape} of the adaLN-Zero DiT with these arguments, in the published order."""
    d, p, c = args["hidden_size"], args["patch_size"], args["in_channels"]
    out = (1 + args.get("learn_sigma", True)) * c
    linear = {
        "x_embedder.proj": (d, c, p, p),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "h_embedder.mlp.0": (d, 256),
        "h_embedder.mlp.2": (d, d),
        "attn.qkv": (3 * d, d),
        "attn.proj": (d, d),
        "mlp.fc1": (MLP_RATIO * d, d),
        "mlp.fc2": (d, MLP_RATIO * d),
        "blocks.adaLN_modulation.1": (6 * d, d),
        "final_layer.linear": (p * p * out, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    shapes = {}
    for path, _, name in _pairs(args):
        if path == "pos_embed":
            shapes[name] = (1, (args["input_size"] // p) ** 2, d)
        elif path == "y_embedder/embedding":
            shapes[name] = (args["num_classes"] + args.get("null_class", True), d)
        else:
            layer, leaf = re.sub(r"^blocks\.\d+\.", "blocks.", name).rsplit(".", 1)
            shape = linear.get(layer) or linear[layer.removeprefix("blocks.")]
            shapes[name] = shape if leaf == "weight" else shape[:1]
    return shapes


def from_published(flat: Mapping[str, np.ndarray], args: Mapping[str, Any], sha256: Any = None) -> dict[str, Any]:
    """Converts {published name: array} to our nested float32 parameters.

    sha256: a hashlib object; it is updated with the float32 bytes of the arrays in the order of `flat`. Raises
    UserError naming the array that is missing, unknown or of another shape.
    """
    expected, file = published_shapes(args), getattr(flat, "path", "weights")
    for name in expected:
        if name not in flat:
            raise UserError(f"{file}: {name} is missing")
    if len(flat) > len(expected):
        raise UserError(f"{file}: unknown array {next(name for name in flat if name not in expected)}")
    # In the order of the file, so that it is read once, one array at a time.
    places = {name: (path, block) for path, block, name in _pairs(args)}
    leaves, hashed = {}, None
    with ThreadPoolExecutor(1) as pool:
        for name, a in flat.items():
            if tuple(a.shape) != expected[name]:
                raise UserError(f"{file}: {name} has shape {tuple(a.shape)}, the model needs {expected[name]}")
            a = np.asarray(a, np.float32)
            if hashed:
                hashed.result()
            hashed = sha256 and pool.submit(sha256.update, np.ascontiguousarray(a))
            path, block = places[name]
            a = _to_ours(path, a, args)
            if path not in leaves:
                leaves[path] = aligned_empty(a.shape if block is None else (args["depth"], *a.shape), np.float32)
            leaves[path][... if block is None else block] = a
    params = {}
    for path, array in leaves.items():
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return params


def to_published(params: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "..."]]:
    """Converts our parameters to {published name: float32 array}, in the published order.

    Raises UserError if the blocks are not adaLN-Zero.
    """
    if args.get("block", "adaln_zero") != "adaln_zero":
        raise UserError(f"model.block={args['block']}: the published format knows adaln_zero only")
    flat = {}
    for path, block, name in _pairs(args):
        a: Any = params
        for key in path.split("/"):
            a = a[key]
        a = np.asarray(a if block is None else a[block], np.float32)
        flat[name] = np.ascontiguousarray(_to_published(path, a, args))
    return flat


def infer_args(
    flat: Mapping[str, np.ndarray], num_heads: int | None = None, num_classes: int | None = None
) -> dict[str, Any]:
    """The arguments of the DiT with these published arrays, inferred from their shapes. Raises UserError.

    A label table of one row is that of an unconditional model. A head of C channels has learn_sigma=False.
    An array h_embedder.* shows a second time.

    Args:
      num_heads: no shape shows it; by default the paper's for the width.
      num_classes: by default the last row of the label table is the null class. If it equals the number of rows, there
        is no null class.
    """
    file = getattr(flat, "path", "weights")
    names = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight")
    for name in names:
        if name not in flat:
            raise UserError(f"{file}: not a DiT of the published format: {name} is missing")
    shapes = [flat[name].shape for name in names]
    for name, shape, ndim in zip(names, shapes, (4, 3, 2)):
        if len(shape) != ndim or 0 in shape[1:]:
            raise UserError(f"{file}: not a DiT of the published format: {name} has another shape, {shape}")
    (d, c, p, _), (_, tokens, _), (rows, _) = shapes
    if num_heads is None and d not in HEADS:
        raise UserError(f"{file}: width {d} is none of the paper's; --num_heads must say how many heads it has")
    num_heads = num_heads or HEADS[d]
    if d < 1 or d % num_heads:
        raise UserError(f"{file}: --num_heads={num_heads} does not divide the weights' width {d}")
    num_classes = rows - 1 if num_classes is None else num_classes
    if num_classes not in (rows, rows - 1) or rows < 1:
        raise UserError(f"{file}: {rows} rows of labels do not fit {num_classes} classes")
    depth = 1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in flat) if m), default=-1)
    if depth > len(flat):  # published_shapes would list every missing block
        raise UserError(f"{file}: has an array of block {depth - 1}, and {len(flat)} arrays in all: blocks are missing")
    head = "final_layer.linear.weight"
    return dict(
        input_size=math.isqrt(tokens) * p,
        patch_size=p,
        in_channels=c,
        hidden_size=d,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        null_class=num_classes == rows - 1,
        learn_sigma=head not in flat or flat[head].shape[:1] != (p * p * c,),
        second_time=any(name.startswith("h_embedder.") for name in flat),
    )
