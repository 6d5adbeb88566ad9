"""Counts what a compiled program does, from its HLO text: arithmetic, bytes moved, collectives.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as it runs. All figures are for one
device, because the text is of the partitioned program.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod

import numpy as np

from dit_jax.aot import hlo
from dit_jax.aot.hlo import Computation, Instruction

COLLECTIVES = tuple(
    """all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute
    collective-broadcast""".split()
)
SLICING = ("dynamic-slice", "slice", "gather")
# Opcodes that only rename memory, or whose bytes are counted in the computations that they call.
FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast while conditional call partition-id replica-id after-all
    opt-barrier get-dimension-size domain""".split()
)
# Custom calls that only rename memory.
FREE_TARGETS = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "ZeroCrop")
COLLECTIVE_TARGETS = "AsyncCollective"  # how the names of those begin that mark the fusions of a collective
KERNEL = "tpu_custom_call"  # a Pallas kernel
MOVING = frozenset(
    "copy transpose reshape concatenate pad broadcast iota slice dynamic-slice dynamic-update-slice".split()
)
# Opcodes of one operation per element, as XLA counts it. The others move data, or are counted separately.
ELEMENTWISE = frozenset(
    """add subtract multiply divide maximum minimum negate abs compare select and or xor not shift-left
    shift-right-logical shift-right-arithmetic sign floor ceil round-nearest-even round-nearest-afz remainder clamp
    is-finite popcnt""".split()
)


@dataclass
class Cost:
    """What a computation takes on one device.

    flops: of matrix products and convolutions, and one per element of elementwise operations and reductions.
    bytes: read and written by the instructions. hbm_bytes: those outside a core's vector memory. chip_bytes: the least
    that the collectives bring into each chip. collectives: {kind: [count, bytes]}, where the bytes are those of the
    larger of operand and result. hbm_kinds: {what moves them: hbm_bytes}.
    """

    flops: float = 0.0
    matrix_flops: float = 0.0
    bytes: float = 0.0
    hbm_bytes: float = 0.0
    chip_bytes: float = 0.0
    collectives: dict[str, list[float]] = field(default_factory=dict)
    hbm_kinds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: "Cost", times: int = 1) -> None:
        for name in ("flops", "matrix_flops", "bytes", "hbm_bytes", "chip_bytes"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for kind, (count, moved) in other.collectives.items():
            total = self.collectives.setdefault(kind, [0, 0])
            total[0] += times * count
            total[1] += times * moved
        for kind, moved in other.hbm_kinds.items():
            self.hbm_kinds[kind] += times * moved

    def move(self, kind: str, moved: float, hbm: float) -> None:
        """Adds bytes that an operation of this kind moves, and those of them in HBM."""
        self.bytes += moved
        self.hbm_bytes += hbm
        self.hbm_kinds[kind] += hbm


@cache  # the blocks of a model repeat a few windows
def window_pairs(taps: int, outputs: int, inputs: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Returns how many pairs (output, tap) of a one-dimensional window meet an input element.

    Output o and tap t meet position o * stride - pad + t * rhs_dilate. Input i lies at position i * lhs_dilate; the
    positions between and outside of the inputs are padding.
    """
    end = (inputs - 1) * lhs_dilate
    start = np.arange(outputs) * stride - pad
    start = start[np.argsort(start % lhs_dilate, kind="stable")]
    # Taps that are lhs_dilate apart meet positions of the same remainder: only the first ones are searched for.
    first_taps = np.arange(min(lhs_dilate, taps))
    remainders = -first_taps * rhs_dilate % lhs_dilate
    bounds = [np.searchsorted(start % lhs_dilate, remainders, side) for side in ("left", "right")]
    pairs = 0
    for tap, i0, i1 in zip(first_taps, *bounds):
        position = start[i0:i1] + tap * rhs_dilate
        step = rhs_dilate * lhs_dilate
        low = np.maximum(0, -(position // step))  # the first of these taps that is not before the inputs
        high = np.minimum((taps - 1 - tap) // lhs_dilate, (end - position) // step)
        pairs += int(np.sum(np.maximum(0, high - low + 1)))
    return pairs


def _convolution_flops(op, shapes):
    """Counts only those positions of the window that meet the input.

    TPU programs write every matrix product as a convolution, with batch dimensions as padded or dilated windows.
    """
    lhs, rhs, out = [hlo.arrays(shape)[0][1] for shape in (*shapes, op.shape)]
    lhs_labels, rhs_labels, out_labels = hlo.must_match(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes).groups()
    match = re.search(r"window=\{([^}]*)\}", op.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", match[1])) if match else {}
    spatial = sorted((label for label in rhs_labels if label.isdigit()), key=int)

    def values(name, default):
        return [int(v.split("_")[0]) for v in window[name].split("x")] if name in window else [default] * len(spatial)

    strides, pads = values("stride", 1), values("pad", 0)  # of a pad low_high only the low one matters
    lhs_dilates, rhs_dilates = values("lhs_dilate", 1), values("rhs_dilate", 1)
    positions = 1
    for i, label in enumerate(spatial):
        taps, outputs = rhs[rhs_labels.index(label)], out[out_labels.index(label)]
        inputs = lhs[lhs_labels.index(label)]
        positions *= window_pairs(taps, outputs, inputs, strides[i], pads[i], lhs_dilates[i], rhs_dilates[i])
    batch, features = out[out_labels.index("b")], out[out_labels.index("f")]
    match = re.search(r"batch_group_count=(\d+)", op.attributes)
    groups = int(match[1]) if match else 1
    return 2 * batch * features * rhs[rhs_labels.index("i")] * positions // groups


def _dot_flops(op, shapes):
    lhs = hlo.arrays(shapes[0])[0][1]
    match = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", op.attributes)
    contracted = [int(d) for d in match[1].split(",") if d] if match else []
    return 2 * hlo.num_elements(op.shape) * prod(lhs[d] for d in contracted)


def _target(op):
    """Returns what a custom call runs; "" if the instruction is none."""
    return hlo.must_match(r'custom_call_target="([^"]*)"', op.attributes)[1] if op.opcode == "custom-call" else ""


def _estimated_flops(kernel):
    """Returns the FLOPs of a kernel by the cost estimate that its author gave it, or None."""
    estimate = re.search(r'"cost_estimate":\{"flops":"?(\d+)', kernel.attributes)
    return int(estimate[1]) if estimate else None


def _shapes(op, computation):
    return [computation[name].shape for name in op.operands]


def _transfer(op):
    """Returns what copy-start and slice-start move between HBM and vector memory: (bytes, those of HBM)."""
    # The shapes are (destination, source, ...) and ((source), destination, ...).
    order = slice(None, 2) if op.opcode == "copy-start" else slice(1, None, -1)
    destination, source = hlo.arrays(op.shape)[order]
    moved = hlo.array_bytes(*destination)
    return 2 * moved, moved * sum(hlo.in_hbm(layout) for _, _, layout in (destination, source))


def _written(fused):
    """Returns the shapes that a fused computation writes. Of an array that is updated in place, only the update is."""

    def source(name):
        while fused[name].opcode == "bitcast":
            name = fused[name].operands[0]
        return fused[name]

    root = hlo.root_of(fused)
    results = [source(name) for name in root.operands] if root.opcode == "tuple" else [source(root.name)]
    if len(results) > 1:
        results = [op for op in results if op.opcode not in ("parameter", *COLLECTIVES)]
    return [fused[op.operands[1]].shape if op.opcode == "dynamic-update-slice" else op.shape for op in results]


def _passes_through(fused, name):
    """Whether a fused computation only hands this value on, as to a collective under way."""
    users = [op for op in fused.values() if name in op.operands]
    return all(op.opcode in ("tuple", *COLLECTIVES) for op in users)


class Program:
    """The costs of one program.

    text: its HLO. chips: the number of the chip of each device, in the order of the mesh.
    """

    def __init__(self, text: str, chips: Sequence[int]):
        self.computations, self.entry = hlo.parse(text)
        self.chips = np.asarray(chips)
        self.devices_per_chip = max(Counter(self.chips.tolist()).values())
        self._costs: dict[str, Cost] = {}
        self._fusion_flops: dict[str, tuple[int, int]] = {}

    def cost(self) -> Cost:
        """Returns what one run of the program takes. Raises ValueError naming what it cannot count."""
        if unknown := self.unknown_calls():
            raise ValueError(f"the program calls {', '.join(unknown)}")
        return self._cost(self.entry)

    def unknown_calls(self) -> list[str]:
        """Returns the names of the custom calls whose arithmetic is not known."""
        unknown = set()
        for op in (op for computation in self.computations.values() for op in computation.values()):
            target = _target(op)
            if target == KERNEL and _estimated_flops(op) is None:
                unknown.add(f"a kernel without a cost estimate ({op.name})")
            elif target not in ("", KERNEL, *FREE_TARGETS) and not target.startswith(COLLECTIVE_TARGETS):
                unknown.add(target)
        return sorted(unknown)

    def flops(self, op: Instruction, computation: Computation) -> tuple[int, int]:
        """Returns the FLOPs of an instruction of this computation, and those of its matrix products."""
        if op.opcode == "fusion":
            name = hlo.called_computations(op)[0]
            if name not in self._fusion_flops:
                fused = self.computations[name]
                parts = [self.flops(part, fused) for part in fused.values()]
                self._fusion_flops[name] = sum(flops for flops, _ in parts), sum(matrix for _, matrix in parts)
            return self._fusion_flops[name]
        if op.opcode in ("convolution", "dot"):
            matrix_flops = _convolution_flops if op.opcode == "convolution" else _dot_flops
            count = matrix_flops(op, _shapes(op, computation))
            return count, count
        if _target(op) == KERNEL:
            count = _estimated_flops(op) or 0
            return count, count
        if op.opcode in ELEMENTWISE:
            return hlo.num_elements(op.shape), 0
        if op.opcode in ("reduce", "reduce-window"):
            return hlo.num_elements(computation[op.operands[0]].shape), 0
        return 0, 0

    def within(self, op: Instruction) -> list[Instruction]:
        """Returns the instruction and those that are fused in it."""
        parts = [op]
        for part in parts:
            if part.opcode == "fusion":
                parts += self._fused(part).values()
        return parts

    def _fused(self, fusion):
        return self.computations[hlo.called_computations(fusion)[0]]

    def _trip_count(self, loop):
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        condition = self.computations[hlo.must_match(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
        root = hlo.root_of(condition)
        if root.opcode == "fusion":  # the comparison itself may be fused
            fused = self._fused(root)
            inner = hlo.root_of(fused)
            outer = {p.name: root.operands[int(p.value)] for p in fused.values() if p.opcode == "parameter"}
            root = inner._replace(operands=[outer.get(name, name) for name in inner.operands])
        operands = [condition[name] for name in root.operands if name in condition]
        limits = [int(op.value) for op in operands if op.opcode == "constant"]
        if root.opcode != "compare" or "direction=LT" not in root.attributes or len(limits) != 1:
            raise ValueError(f"the loop {loop.name} runs an unknown number of times")
        return limits[0]

    def _cost(self, name):
        """Returns the cost of a computation, which runs its instructions one after another."""
        if name not in self._costs:
            self._costs[name] = total = Cost()
            computation = self.computations[name]
            for op in computation.values():
                self._add(total, op, computation)
        return self._costs[name]

    def _add(self, total, op, computation):
        kind = op.opcode.removesuffix("-start")
        if op.opcode.endswith(("-done", "-update")):
            return  # counted where it starts
        if op.opcode == "while":
            total.add(self._cost(hlo.called_computations(op)[0]), self._trip_count(op))
        elif op.opcode == "conditional":
            branches = [self._cost(name) for name in hlo.called_computations(op)]
            total.add(max(branches, key=lambda cost: cost.flops + cost.bytes))
        elif op.opcode in ("call", "async-start"):
            total.add(self._cost(hlo.called_computations(op)[0]))
        elif kind in COLLECTIVES:
            self._add_collective(total, kind, op, computation, op.shape)
        elif op.opcode != "fusion" or not self._add_fused_collective(total, op):
            flops, matrix_flops = self.flops(op, computation)
            total.flops += flops
            total.matrix_flops += matrix_flops
            if op.opcode not in FREE and _target(op) not in FREE_TARGETS:
                moved, hbm = self._moved(op, computation)
                total.move(self._kind(op), moved, hbm)

    def _kind(self, op):
        """Returns what an instruction that is no collective mainly does."""
        parts = self.within(op)
        if any(_target(part) == KERNEL for part in parts):
            return "kernels"
        if any(part.opcode in ("convolution", "dot") for part in parts):
            return "matrix products"
        if op.opcode in ("copy-start", "slice-start"):
            return "transfers to and from vector memory"
        moving = all(part.opcode in (*FREE, *MOVING, "fusion") for part in parts)
        return "copies" if moving else "elementwise and reductions"

    def _add_fused_collective(self, total, fusion):
        """Adds the collective that a fusion stands for. Returns False if the fusion is to be counted as other work."""
        name = hlo.called_computations(fusion)[0]
        fused = self.computations[name]
        target = next((op.attributes for op in fused.values() if "AsyncCollective" in op.attributes), "")
        if "AsyncCollectiveDone" in target:
            return True
        collective = next((op for op in fused.values() if op.opcode.removesuffix("-start") in COLLECTIVES), None)
        # TPU v5 and later run a collective in steps among other work. Each of these fusions holds it, and the fusion
        # that starts it has counted it.
        if collective is None or "async_collective_fusion" in name:
            return False
        # A reduce-scatter is an all-reduce that is fused with the slice behind it.
        root = hlo.root_of(fused)
        scatters = (
            collective.opcode == "all-reduce" and not target and hlo.size(root.shape) < hlo.size(collective.shape)
        )
        kind = "reduce-scatter" if scatters else collective.opcode.removesuffix("-start")
        self._add_collective(total, kind, collective, fused, collective.shape if target else root.shape)
        return True

    def _add_collective(self, total, kind, op, computation, result):
        """Adds a collective whose result has the shape `result`."""
        inputs = sum(map(hlo.size, _shapes(op, computation)))
        groups = hlo.replica_groups(op.attributes, len(self.chips))
        members = groups.shape[1]
        whole = inputs * members if kind == "all-gather" else inputs
        if kind == "collective-permute":
            pairs = hlo.must_match(r"source_target_pairs=\{(.*?\})\}", op.attributes)[1]
            pairs = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)]
            crossing = sum(self.chips[a] != self.chips[b] for a, b in pairs) / max(len(pairs), 1)
            chip_bytes = inputs * self.devices_per_chip * crossing
        else:
            # Members of a group on one chip can share what arrives there.
            shared = max(Counter(self.chips[groups[0]].tolist()).values())
            ways = 2 if kind == "all-reduce" else 1
            chip_bytes = ways * self.devices_per_chip / shared * whole * (1 - shared / members)
            if kind == "all-to-all":  # each member keeps its own part, and shares nothing
                chip_bytes = self.devices_per_chip * whole * (1 - shared / members)
        collective = total.collectives.setdefault(kind, [0, 0])
        collective[0] += 1
        collective[1] += whole
        total.chip_bytes += chip_bytes
        moved = inputs + (whole if op.opcode.endswith("-start") else hlo.size(result))
        total.move("collectives", moved, moved)

    def _moved(self, op, computation):
        """Returns the bytes that an instruction reads and writes, and those of them in HBM.

        Of an array that is only sliced, or updated in place, only the slice counts.
        """
        if op.opcode in ("copy-start", "slice-start"):
            return _transfer(op)
        shapes = _shapes(op, computation)
        if op.opcode in SLICING:
            parts = [op.shape, op.shape]
        elif op.opcode == "dynamic-update-slice":
            parts = [shapes[1], shapes[1]]
        elif op.opcode == "fusion":
            fused = self._fused(op)
            parts = _written(fused) + self._read(fused, shapes)
        else:
            parts = [op.shape, *shapes]
        return sum(map(hlo.size, parts)), sum(map(hlo.hbm_size, parts))

    def _read(self, fused, shapes):
        """Returns the shapes that a fused computation reads of its operands, which have these shapes."""
        parts = []
        for parameter in fused.values():
            if parameter.opcode != "parameter" or _passes_through(fused, parameter.name):
                continue
            whole = shapes[int(parameter.value)]
            slices = self._slices(fused, parameter.name)
            if slices is None:
                parts.append(whole)
            else:  # a slice lies where the whole does
                memory = "{S(1)}" if not hlo.in_hbm(whole) else ""
                parts += [shape.replace("S(1)", "") + memory for shape in slices]
        return parts

    def _slices(self, fused, name):
        """Returns the shapes of the slices that a fused computation reads of its value `name`, or None if it reads the
        whole. Slices that it updates in place count where they are written."""
        slices = []
        for user in fused.values():
            if name not in user.operands:
                continue
            first = user.operands[0] == name
            if user.opcode in SLICING and first:
                slices.append(user.shape)
            elif user.opcode == "dynamic-update-slice" and first:
                pass
            elif user.opcode in ("bitcast", "fusion"):
                for computation, alias in self._aliases(fused, user, name):
                    more = self._slices(computation, alias)
                    if more is None:
                        return None
                    slices += more
            else:
                return None
        return slices

    def _aliases(self, fused, user, name):
        """Returns [(computation, name)] under which a bitcast or fusion of the value `name` knows it."""
        if user.opcode == "bitcast":
            return [(fused, user.name)]
        inner = self._fused(user)
        parameters = [op for op in inner.values() if op.opcode == "parameter"]
        return [(inner, op.name) for op in parameters if user.operands[int(op.value)] == name]
