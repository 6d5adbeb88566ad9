"""Batches: the order and the flips are a function of (seed, step) alone.

Row r of the global batch at step s is element s * B + r of one endless, epoch-wise shuffled sequence (grain). Each
process reads only the rows that its devices hold, so that any number of hosts and devices sees the same batches,
and the step is all that a checkpoint needs of the data.
"""

import queue
import threading

import grain
import jax
import numpy as np


class _Indices:
    """range(length), as grain wants it."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


def _draw_flip(index, rng):
    return index, rng.random() < 0.5


def order(length, seed, flip):
    """Endless: order[i] -> (index into the source, whether to mirror)."""
    indices = grain.MapDataset.source(_Indices(length)).seed(seed).shuffle().repeat()
    return indices.random_map(_draw_flip) if flip else indices.map(lambda index: (index, False))


def global_batch(source, sequence, step, batch_size, shape, sharding):
    """The batch of `step` as global arrays {"x": (B, H, W, C) float32, "y": (B,) int32}."""
    rows = {}

    def row(r):
        if r not in rows:
            rows[r] = source.example(*sequence[step * batch_size + r])
        return rows[r]

    def part(name):
        return lambda index: np.stack([row(r)[name] for r in range(*index[0].indices(batch_size))])

    return {"x": jax.make_array_from_callback((batch_size, *shape), sharding, part("x")),
            "y": jax.make_array_from_callback((batch_size,), sharding, part("y"))}


def batches(source, *, seed, flip, first_step, last_step, batch_size, sharding, prefetch=2):
    """Yields the batches of steps first_step .. last_step - 1, read ahead by a thread."""
    sequence = order(len(source), seed, flip)
    shape = source.example(0)["x"].shape
    ready, stop = queue.Queue(prefetch), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                pass

    def read():
        try:
            for step in range(first_step, last_step):
                put(global_batch(source, sequence, step, batch_size, shape, sharding))
                if stop.is_set():
                    return
        except Exception as e:
            put(e)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        for _ in range(first_step, last_step):
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
