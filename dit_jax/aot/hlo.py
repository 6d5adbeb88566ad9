"""Parses the HLO text of a compiled program: instructions, shapes, replica groups."""

import re
from math import prod
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

BITS = {
    dtype: bits
    for bits, dtypes in {
        4: "s4 u4",
        8: "pred s8 u8",
        16: "s16 u16 bf16 f16",
        32: "s32 u32 f32",
        64: "s64 u64 f64 c64",
    }.items()
    for dtype in dtypes.split()
}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")


class Instruction(NamedTuple):
    """One instruction of a computation.

    shape: as text, of its result. operands: names of instructions. value: the text between the brackets of a constant
    (its value) or a parameter (its number), else "". attributes: the text behind the operands. root: whether its result
    is the computation's.
    """

    name: str
    shape: str
    opcode: str
    operands: list[str]
    value: str
    attributes: str
    root: bool


Computation = dict[str, Instruction]


def must_match(pattern: str, text: str) -> re.Match[str]:
    """Returns the first match of the pattern. Raises ValueError if there is none."""
    if match := re.search(pattern, text):
        return match
    raise ValueError(f"HLO without {pattern}: {text[:100]}")


def _split_brackets(text):
    """Returns the text up to the bracket that closes the first one, and the rest."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"unbalanced HLO: {text[:100]}")


def _parse_instruction(name, text, root):
    if text.startswith("("):
        shape, text = _split_brackets(text)
    else:
        shape, text = text.split(" ", 1)
    opcode, text = text.strip().split("(", 1)
    inside, attributes = _split_brackets("(" + text)
    if opcode in ("constant", "parameter"):
        return Instruction(name, shape, opcode, [], inside[1:-1], attributes, root)
    return Instruction(name, shape, opcode, re.findall(r"%([\w.\-]+)", inside), "", attributes, root)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of an HLO text by name, and the name of the entry computation."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None:
            head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
            if head and not line.startswith("HloModule"):
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _LINE.match(line):
            current[match[2]] = _parse_instruction(match[2], match[3], bool(match[1]))
    return computations, entry


def root_of(computation: Computation) -> Instruction:
    """Returns the instruction that makes the computation's result."""
    return next(op for op in computation.values() if op.root)


def called_computations(op: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction runs."""
    if branches := re.search(r"branch_computations=\{([^}]*)\}", op.attributes):
        return re.findall(r"%([\w.\-]+)", branches[1])
    return re.findall(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)", op.attributes)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Returns (dtype, dimensions, layout) of each array of a shape: several if it is a tuple."""
    return [
        (dtype, tuple(int(d) for d in dims.split(",") if d), layout or "")
        for dtype, dims, layout in _SHAPE.findall(shape)
        if dtype in BITS
    ]


def array_bytes(dtype: str, dims: tuple[int, ...], layout: str) -> int:
    """Returns the bytes of one array in memory. The layout {1,0:T(8,128)} rounds its minor dimensions up to tiles."""
    padded = list(dims)
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        sizes = [int(t) for t in tile[1].split(",")]
        minor_to_major = [int(d) for d in must_match(r"^\{([\d,]*)", layout)[1].split(",") if d]
        for dim, t in zip(minor_to_major, reversed(sizes)):
            padded[dim] = -(-padded[dim] // t) * t
    return BITS[dtype] * prod(padded) // 8


def in_hbm(layout: str) -> bool:
    """Whether an array of this layout lies outside a core's vector memory, which is S(1)."""
    return "S(1)" not in layout


def size(shape: str) -> int:
    """Returns the bytes of a shape."""
    return sum(array_bytes(*array) for array in arrays(shape))


def hbm_size(shape: str) -> int:
    """Returns the bytes of the arrays of a shape that lie in HBM."""
    return sum(array_bytes(*array) for array in arrays(shape) if in_hbm(array[2]))


def num_elements(shape: str) -> int:
    return sum(prod(dims) for _, dims, _ in arrays(shape))


def replica_groups(attributes: str, devices: int) -> Int[np.ndarray, "groups members"]:
    """Returns the groups of devices among which a collective runs. Without the attribute all devices are one group."""
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims, reshape = ([int(v) for v in match[i].split(",")] for i in (1, 2))
        order = [int(v) for v in match[3].split(",")] if match[3] else range(len(reshape))
        return np.arange(prod(reshape)).reshape(reshape).transpose(order).reshape(dims)
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        return _mesh_groups(match[1], match[2], devices)
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array([[int(v) for v in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", match[1])])
    return np.arange(devices)[None]


def _mesh_groups(mesh, named, devices):
    """Returns the replica groups of mesh['a'=64,'b'=4] {'a','b':(2)2}: a group spans the named axes.

    'b':(2)2 names only a part of axis b, namely the 2 devices behind an outer part of 2.
    """
    axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
    parts, grouped = {name: [n] for name, n in axes.items()}, []
    for name, before, n in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named):
        if before:
            parts[name] = [int(before), int(n), axes[name] // int(before) // int(n)]
        grouped.append((name, 1 if before else 0))
    position = {key: k for k, key in enumerate((name, i) for name in parts for i in range(len(parts[name])))}
    last = [position[key] for key in grouped]
    sizes = [n for part in parts.values() for n in part]
    order = [k for k in range(len(sizes)) if k not in last] + last
    return np.arange(devices).reshape(sizes).transpose(order).reshape(-1, prod(sizes[k] for k in last))
