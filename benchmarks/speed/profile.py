"""Where the time of a compiled program goes, by kind of work, on a CPU.

It is read off a trace of one call, whose events bear the names of the instructions in the program's HLO text.
"""

import glob
import math
import os
import re
import tempfile
import time
from collections import Counter

import jax

from dit_jax.aot import cost, hlo

WEIGHTS, ATTENTION, CONVOLUTIONS = "products with weights", "attention's products", "convolutions"
ELEMENTWISE, MOVING = "elementwise operations, reductions", "copies, slices"
OPTIMIZER = "AdamW, EMA, norms of gradient and weights"
KINDS = (WEIGHTS, ATTENTION, CONVOLUTIONS, ELEMENTWISE, MOVING, OPTIMIZER)  # the rest is between the operations
ARITHMETIC = cost.ELEMENTWISE | {
    "reduce",
    "reduce-window",
    "exponential",
    "exponential-minus-one",
    "log",
    "log-plus-one",
    "tanh",
    "logistic",
    "rsqrt",
    "sqrt",
    "power",
    "sine",
    "cosine",
    "erf",
}


def _is_array(shape):
    return any(math.prod(dims) > 1 for _, dims, _ in hlo.arrays(shape))


def instructions(text):
    """Returns {instruction: (kind, matrix FLOPs, whether it is handed to a pool of threads)} of an HLO text.

    Instructions that do not run by themselves are left out.
    """
    program, found = cost.Program(text, [0]), {}
    for computation in program.computations.values():
        for i in computation.values():
            if i.opcode in cost.FREE:  # a loop's time is that of what is in it
                continue
            matrix, inside = program.flops(i, computation)[1], program.within(i)
            if matrix:
                batched = any(c.opcode == "dot" and re.search(r"lhs_batch_dims=\{\d", c.attributes) for c in inside)
                convolution = any(c.opcode == "convolution" for c in inside)
                kind = CONVOLUTIONS if convolution else ATTENTION if batched else WEIGHTS
            elif "/optimizer/" in i.attributes:  # the scope in training.step.update
                kind = OPTIMIZER
            else:
                # A copy may hold arithmetic on an index, a single number.
                kind = ELEMENTWISE if any(c.opcode in ARITHMETIC and _is_array(c.shape) for c in inside) else MOVING
            # Outside a fusion, a product is handed to a pool of threads, and goes on when its event has ended.
            found[i.name] = kind, matrix, i.opcode in ("dot", "convolution")
    return found


def profile(text, call):
    """Returns {"seconds": of one call(), "kinds": {kind: [seconds, matrix FLOPs]}}.

    text: HLO of the program that is called. Operations that ran side by side count each. Time in which no operation was
    seen counts for a product, where that is what had been begun last.
    """
    known, seconds, flops = instructions(text), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            call()
            whole = time.perf_counter() - start
        (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
        events = sorted(
            (event.start_ns, event.duration_ns, event.name)
            for plane in jax.profiler.ProfileData.from_file(path).planes
            for line in plane.lines
            for event in line.events
            if event.name in known
        )
    busy, last = 0.0, None
    for start, duration, name in events:
        if last and start > busy:
            seconds[last] += (start - busy) / 1e9
        busy = max(busy, start + duration)
        kind, matrix, begun = known[name]
        seconds[kind] += duration / 1e9
        flops[kind] += matrix
        last = kind if begun else None
    return {"seconds": whole, "kinds": {kind: [seconds[kind], flops[kind]] for kind in KINDS if seconds[kind]}}
