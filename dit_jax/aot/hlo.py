"""What a compiled program does, read off its HLO text: arithmetic, bytes moved, collectives.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. Everything is for one
device: the text is of the partitioned program.
"""

import re
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32,
        "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")
# Ops that only rename memory, or whose bytes are counted in the computations that they call.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "partition-id",
        "replica-id", "after-all", "opt-barrier", "get-dimension-size", "domain"}
FREE_TARGETS = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")  # of custom calls, likewise
# One operation an element, as XLA counts it; what is not here moves data, or is counted apart.
ELEMENTWISE = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "compare", "select", "and",
               "or", "xor", "not", "shift-left", "shift-right-logical", "shift-right-arithmetic", "sign", "floor", "ceil",
               "round-nearest-even", "round-nearest-afz", "remainder", "clamp", "is-finite", "popcnt"}

Instruction = namedtuple("Instruction", "name shape opcode operands attributes root")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclass
class Cost:
    """flops: of matrix products and convolutions, and one an element for elementwise ops and reductions.
    bytes: read and written by the instructions; hbm_bytes: of these, what is not in a core's own vector memory.
    collectives: {kind: [count, bytes]}, the bytes of the larger of operand and result.
    chip_bytes: what the collectives must bring into each chip at least."""
    flops: float = 0.0
    matrix_flops: float = 0.0
    bytes: float = 0.0
    hbm_bytes: float = 0.0
    chip_bytes: float = 0.0
    collectives: dict = field(default_factory=dict)

    def add(self, other, times=1):
        for name in ("flops", "matrix_flops", "bytes", "hbm_bytes", "chip_bytes"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for kind, (count, size) in other.collectives.items():
            there = self.collectives.setdefault(kind, [0, 0])
            there[0] += times * count
            there[1] += times * size


def _split(text):
    """(up to the bracket that closes the one at its start, the rest)."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if not depth:
            return text[: i + 1], text[i + 1:]
    raise ValueError(f"unbalanced HLO: {text[:100]}")


def parse(text):
    """HLO text -> ({computation: {name: Instruction}}, the entry computation's name)."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
            if head and not line.startswith("HloModule"):
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _LINE.match(line):
            rest = match[3]
            if rest.startswith("("):
                shape, rest = _split(rest)
            else:
                shape, rest = rest.split(" ", 1)
            opcode, rest = rest.strip().split("(", 1)
            inside, attributes = _split("(" + rest)
            if opcode in ("constant", "parameter"):
                operands = inside[1:-1]
            else:
                operands = re.findall(r"%([\w.\-]+)", inside)
            current[match[2]] = Instruction(match[2], shape, opcode, operands, attributes, bool(match[1]))
    return computations, entry


def arrays(shape):
    """[(dtype, dims, layout)] of a shape's text; a tuple gives all its parts."""
    return [(dtype, tuple(int(d) for d in dims.split(",") if d), layout or "")
            for dtype, dims, layout in _SHAPE.findall(shape) if dtype in BITS]


def _padded(dims, layout):
    """Dimensions as they lie in memory: {1,0:T(8,128)} rounds the minor ones up to whole tiles."""
    dims = list(dims)
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        tile = [int(t) for t in tile[1].split(",")]
        order = [int(d) for d in re.match(r"\{([\d,]*)", layout)[1].split(",") if d]
        for dim, t in zip(order, reversed(tile)):
            dims[dim] = -(-dims[dim] // t) * t
    return dims


def size(shape, hbm=False, padded=True):
    """Bytes of a shape's text; with hbm, of the parts that are not in vector memory, S(1)."""
    return sum(BITS[dtype] * prod(_padded(dims, layout) if padded else dims) // 8
               for dtype, dims, layout in arrays(shape) if not (hbm and "S(1)" in layout))


def _elements(shape):
    return sum(prod(dims) for _, dims, _ in arrays(shape))


def _dims(text, name):
    found = re.search(name + r"=\{([0-9,]*)\}", text)
    return [int(d) for d in found[1].split(",") if d] if found else []


@lru_cache(maxsize=None)  # the blocks of a model repeat the same few
def _meetings(taps, outputs, inputs, stride, pad, dilate, step):
    """How many pairs of a window's taps, `step` apart, and outputs meet an input, where inputs lie `dilate` apart."""
    end = (inputs - 1) * dilate
    start = np.arange(outputs) * stride - pad
    start = start[np.argsort(start % dilate, kind="stable")]
    first = np.arange(min(dilate, taps))  # every `dilate`-th tap falls on the inputs alike
    bounds = [np.searchsorted(start % dilate, -first * step % dilate, side) for side in ("left", "right")]
    found = 0
    for tap, i0, i1 in zip(first, *bounds):
        at = start[i0:i1] + tap * step
        low = np.maximum(0, -(at // (step * dilate)))  # the first of them that is not before the input
        high = np.minimum((taps - 1 - tap) // dilate, (end - at) // (step * dilate))
        found += int(np.sum(np.maximum(0, high - low + 1)))
    return found


def _convolution_flops(instruction, shapes):
    """TPU programs write every matrix product as a convolution, batch dimensions as padded or dilated windows: only
    the window's positions that meet the input count."""
    lhs, rhs, out = [arrays(s)[0][1] for s in (*shapes, instruction.shape)]
    a, b, c = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or "_ ")[1]
                             if "window=" in instruction.attributes else ""))
    spatial = [label for label in b if label.isdigit()]
    n = len(spatial)

    def values(name, default):
        return [int(v) for v in window[name].split("x")] if name in window else [default] * n

    pads = [int(p.split("_")[0]) for p in window["pad"].split("x")] if "pad" in window else [0] * n
    positions = 1
    for i, label in enumerate(sorted(spatial, key=int)):
        positions *= _meetings(rhs[b.index(label)], out[c.index(label)], lhs[a.index(label)], values("stride", 1)[i],
                               pads[i], values("lhs_dilate", 1)[i], values("rhs_dilate", 1)[i])
    batch, features = out[c.index("b")], out[c.index("f")]
    groups = int((re.search(r"batch_group_count=(\d+)", instruction.attributes) or [0, 1])[1])
    return 2 * batch * features * rhs[b.index("i")] * positions // groups


def _dot_flops(instruction, shapes):
    lhs = arrays(shapes[0])[0][1]
    return 2 * _elements(instruction.shape) * prod(lhs[d] for d in _dims(instruction.attributes, "lhs_contracting_dims"))


def replica_groups(attributes, devices):
    """The groups of devices of a collective, as an array (groups, members)."""
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims, reshape = ([int(v) for v in found[i].split(",")] for i in (1, 2))
        order = [int(v) for v in found[3].split(",")] if found[3] else range(len(reshape))
        return np.arange(prod(reshape)).reshape(reshape).transpose(order).reshape(dims)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        # mesh['a'=64,'b'=4] {'a','b':(2)2}: the named axes, the latter only the part of size 2 behind another 2.
        axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        parts, grouped = {name: [n] for name, n in axes.items()}, []
        for name, before, n in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[2]):
            if before:
                parts[name] = [int(before), int(n), axes[name] // int(before) // int(n)]
            grouped.append((name, 1 if before else 0))
        index = {key: k for k, key in enumerate((name, i) for name in parts for i in range(len(parts[name])))}
        last = [index[key] for key in grouped]
        sizes = [n for part in parts.values() for n in part]
        order = [k for k in range(len(sizes)) if k not in last] + last
        return np.arange(devices).reshape(sizes).transpose(order).reshape(-1, prod(sizes[k] for k in last))
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array([[int(v) for v in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])])
    return np.arange(devices)[None]


class Program:
    """The analysis of one program. chips: the chip of each device, in the order of the mesh."""

    def __init__(self, text, chips):
        self.computations, self.entry = parse(text)
        self.chips = np.asarray(chips)
        self.per_chip = max(Counter(self.chips.tolist()).values())
        self._costs, self._fused = {}, {}

    def cost(self):
        return self._cost(self.entry)

    def _trip_count(self, loop):
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
        root = next(i for i in condition.values() if i.root)
        if root.opcode == "fusion":  # the comparison itself may have been fused
            fused = self.computations[self._called(root)[0]]
            inner = next(i for i in fused.values() if i.root)
            outer = {p.name: root.operands[int(p.operands)] for p in fused.values() if p.opcode == "parameter"}
            root = inner._replace(operands=[outer.get(o, o) for o in inner.operands])
        limits = [int(condition[o].operands) for o in root.operands
                  if o in condition and condition[o].opcode == "constant"]
        if root.opcode != "compare" or "direction=LT" not in root.attributes or len(limits) != 1:
            raise ValueError(f"the loop {loop.name} runs an unknown number of times")
        return limits[0]

    @staticmethod
    def _called(instruction):
        return re.findall(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)",
                          instruction.attributes)

    def _cost(self, name):
        """Of a computation whose instructions run one after another."""
        if name not in self._costs:
            self._costs[name] = total = Cost()
            computation = self.computations[name]
            for instruction in computation.values():
                self._add(total, instruction, computation)
        return self._costs[name]

    def _add(self, total, i, computation):
        kind = i.opcode.removesuffix("-start")
        if i.opcode.endswith("-done") or i.opcode.endswith("-update"):
            return
        if i.opcode == "while":
            return total.add(self._cost(self._called(i)[0]), self._trip_count(i))
        if i.opcode == "conditional":
            branches = self._called(i) or re.findall(r"%([\w.\-]+)", re.search(r"branch_computations=\{([^}]*)\}",
                                                                             i.attributes)[1])
            return total.add(max((self._cost(b) for b in branches), key=lambda c: c.flops + c.bytes))
        if i.opcode in ("call", "async-start"):
            return total.add(self._cost(self._called(i)[0]))
        if kind in COLLECTIVES:
            return self._add_collective(total, kind, i, computation, i.shape)
        if i.opcode == "fusion":
            fused = self.computations[self._called(i)[0]]
            inner = next((c for c in fused.values() if c.opcode.removesuffix("-start") in COLLECTIVES), None)
            # TPU v5 and later: a collective's steps among other work, in fusions that hold it each: the first counts it.
            going_on = inner is not None and "async_collective_fusion" in self._called(i)[0]
            target = next((c.attributes for c in fused.values() if "AsyncCollective" in c.attributes), "")
            if "AsyncCollectiveDone" in target:
                return
            if inner is not None and not going_on:  # a reduce-scatter is an all-reduce fused with the slice that follows
                root = next(c for c in fused.values() if c.root)
                scatters = inner.opcode == "all-reduce" and not target and size(root.shape) < size(inner.shape)
                kind = "reduce-scatter" if scatters else inner.opcode.removesuffix("-start")
                return self._add_collective(total, kind, inner, fused, inner.shape if target else root.shape)
        flops, matrix = self.flops(i, computation)
        total.flops += flops
        total.matrix_flops += matrix
        if i.opcode not in FREE and not any(f'"{target}"' in i.attributes for target in FREE_TARGETS):
            moved, hbm = self._moved(i, computation)
            total.bytes += moved
            total.hbm_bytes += hbm

    def within(self, i):
        """An instruction, and those that are fused in it."""
        found = [i]
        for part in found:
            if part.opcode == "fusion":
                found += self.computations[self._called(part)[0]].values()
        return found

    def flops(self, i, computation):
        """(all, of matrix products) of an instruction of this computation."""
        if i.opcode == "fusion":
            name = self._called(i)[0]
            if name not in self._fused:
                inner = self.computations[name]
                parts = [self.flops(c, inner) for c in inner.values()]
                self._fused[name] = tuple(map(sum, zip(*parts)))
            return self._fused[name]
        if i.opcode == "convolution":
            return (_convolution_flops(i, [computation[o].shape for o in i.operands]),) * 2
        if i.opcode == "dot":
            return (_dot_flops(i, [computation[o].shape for o in i.operands]),) * 2
        if i.opcode in ELEMENTWISE:
            return _elements(i.shape), 0
        if i.opcode in ("reduce", "reduce-window"):
            return _elements(computation[i.operands[0]].shape), 0
        return 0, 0

    def _moved(self, i, computation):
        """(bytes, those outside vector memory) that an instruction reads and writes: of what is only sliced, or
        updated in place, the slice."""
        shapes = [computation[o].shape for o in i.operands]
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            parts = [i.shape, i.shape]
        elif i.opcode == "dynamic-update-slice":
            parts = [shapes[1], shapes[1]]
        elif i.opcode in ("copy-start", "slice-start"):  # (destination, source, ...) and ((source), destination, ...)
            order = slice(None, 2) if i.opcode == "copy-start" else slice(1, None, -1)
            layouts = [layout for _, _, layout in arrays(i.shape)[order]]
            dtype, dims, _ = arrays(i.shape)[order][0]
            moved = BITS[dtype] * prod(_padded(dims, layouts[0])) // 8  # from HBM to vector memory, or back
            return 2 * moved, moved * sum("S(1)" not in layout for layout in layouts)
        elif i.opcode == "fusion":
            fused = self.computations[self._called(i)[0]]
            parts = self._written(i, fused)
            for p in fused.values():
                if p.opcode == "parameter" and not self._passes(fused, p.name):
                    whole = shapes[int(p.operands)]
                    slices = self._slices(fused, p.name)
                    parts += [whole] if slices is None else [
                        s.replace("S(1)", "") + ("{S(1)}" if "S(1)" in whole else "") for s in slices]
        else:
            parts = [i.shape, *shapes]
        return sum(map(size, parts)), sum(size(p, hbm=True) for p in parts)

    def _slices(self, fused, name):
        """Shapes of the slices that a fused computation takes of its value `name`, or updates in it in place; None
        where it reads the whole."""
        slices = []
        for user in fused.values():
            if user.opcode in ("parameter", "constant") or name not in user.operands:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                slices.append(user.shape)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                pass  # counted where it is written
            elif user.opcode in ("bitcast", "fusion"):
                inner = [(fused, user.name)] if user.opcode == "bitcast" else [
                    (self.computations[self._called(user)[0]], p) for p in self._parameters(user, name)]
                for computation, value in inner:
                    more = self._slices(computation, value)
                    if more is None:
                        return None
                    slices += more
            else:
                return None
        return slices

    @staticmethod
    def _passes(fused, name):
        """Whether the value only passes through: a collective under way takes it along."""
        return all(user.opcode in ("tuple", *COLLECTIVES) for user in fused.values() if user.opcode != "parameter"
                   and name in user.operands)

    def _parameters(self, fusion, operand):
        """The names by which a fusion's computation knows one of its operands."""
        return [p.name for p in self.computations[self._called(fusion)[0]].values()
                if p.opcode == "parameter" and fusion.operands[int(p.operands)] == operand]

    @staticmethod
    def _written(i, fused):
        """Shapes of what a fusion writes: of an update in place, the update."""
        def source(name):
            while fused[name].opcode == "bitcast":
                name = fused[name].operands[0]
            return fused[name]

        root = next(c for c in fused.values() if c.root)
        roots = [source(o) for o in root.operands] if root.opcode == "tuple" else [source(root.name)]
        roots = [r for r in roots if r.opcode not in ("parameter", *COLLECTIVES)] if len(roots) > 1 else roots
        return [fused[r.operands[1]].shape if r.opcode == "dynamic-update-slice" else r.shape for r in roots]

    def _add_collective(self, total, kind, i, computation, result):
        shapes = [computation[o].shape for o in i.operands]
        groups = replica_groups(i.attributes, len(self.chips))
        inputs, members = sum(map(size, shapes)), groups.shape[1]
        whole = inputs * members if kind == "all-gather" else inputs
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", re.search(r"source_target_pairs=\{(.*?\})\}", i.attributes)[1])
            crossing = sum(self.chips[int(a)] != self.chips[int(b)] for a, b in pairs) / max(len(pairs), 1)
            chip_bytes = inputs * self.per_chip * crossing
        else:
            # Members of a group on one chip can share what arrives there.
            shared = max(Counter(self.chips[groups[0]].tolist()).values())
            chip_bytes = (2 if kind == "all-reduce" else 1) * self.per_chip / shared * whole * (1 - shared / members)
            if kind == "all-to-all":  # each member keeps its own part, and shares nothing
                chip_bytes = self.per_chip * whole * (1 - shared / members)
        count = total.collectives.setdefault(kind, [0, 0])
        count[0] += 1
        count[1] += whole
        total.chip_bytes += chip_bytes
        moved = inputs + (whole if i.opcode.endswith("-start") else size(result))
        total.bytes += moved
        total.hbm_bytes += moved
