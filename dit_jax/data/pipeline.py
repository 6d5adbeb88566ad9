"""Batches: the order and the flips are a function of (seed, step) alone.

Row r of the global batch at step s is element s * B + r of one endless sequence, every epoch a permutation of its own.
Each process reads only the rows that its devices hold, so that any number of hosts and devices sees the same batches,
and the step is all that a checkpoint needs of the data.
"""

import functools
import itertools
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from dit_jax.runtime.errors import UserError
from dit_jax.vae.autoencoder import batch_size


@functools.lru_cache(maxsize=2)
def _permutation(length, seed, epoch):
    # Of raw random bits, which NumPy promises never to change; its own shuffle may.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(length), kind="stable")


def order(length, seed, flip, step, batch_size, rows):
    """Which examples the rows (n,) of the global batch of `step` are -> (indices into the source, whether mirrored)."""
    rows = np.asarray(rows)
    epochs, places = np.divmod(step * batch_size + rows, length)
    indices = np.empty(len(rows), np.int64)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        indices[now] = _permutation(length, seed, int(epoch))[places[now]]
    # Drawn for the whole batch: which rows are read here does not matter.
    flips = np.random.Generator(np.random.Philox(key=[seed, step])).random(batch_size) < 0.5 if flip else np.zeros(
        batch_size, bool)
    return indices, flips[rows]


def _check_labels(source, indices, y, num_classes):
    """The label `num_classes` is the null class, and -1 wraps around to it: both would train silently wrong."""
    wrong = (y < 0) | (y >= num_classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(f"{source.identity}: example {indices[at]} has the label {y[at]}, but model.num_classes="
                         f"{num_classes} has 0 to {num_classes - 1}")


def global_batch(source, step, *, seed, flip, batch_size, sharding, num_classes=0):
    """The batch of `step` as global arrays {"x": (B, ...) as the source stores it, "y": (B,) int32}.

    num_classes: labels are checked against it, where it is not 0. Raises UserError naming the example.
    """
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({r for (part,) in held for r in range(*part.indices(batch_size))})
    indices, flips = order(len(source), seed, flip, step, batch_size, rows)
    read = source.examples(indices, flips)
    if num_classes:
        _check_labels(source, indices, read["y"], num_classes)

    def place(values):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            first = rows.index(start)
            return values[first: first + stop - start]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

    return {name: place(values) for name, values in read.items()}


class Batches:
    """The batches of steps first_step .. last_step - 1, `ahead` of them being read and sent to the devices by threads.
    kwargs: of global_batch. To be closed."""

    def __init__(self, source, *, first_step, last_step, ahead=3, **kwargs):
        self.waited = 0.0  # seconds in which the devices had nothing to do because no batch was there
        self._pool = ThreadPoolExecutor(2)  # one reads while the other checks what it has read
        self._coming = (self._pool.submit(global_batch, source, step, **kwargs) for step in range(first_step, last_step))
        self._ready = deque(itertools.islice(self._coming, ahead))

    def get(self, running=None):
        """The next batch. running: arrays that the devices are at work on. Raises what the reading raised."""
        future = self._ready.popleft()
        if not future.done():
            jax.block_until_ready(running)
            start = time.perf_counter()
            wait([future])
            self.waited += time.perf_counter() - start
        self._ready.extend(itertools.islice(self._coming, 1))
        return future.result()

    def close(self):
        self._pool.shutdown(cancel_futures=True)


def model_input(mesh, sharding, *, seed, scale=None, vae=None):
    """run(batch, step) -> the same batch with x (B, H, W, C) float32 as the model takes it, on the devices.

    scale: of a source of posteriors [mean, std], of which latents are drawn anew at every step, as in the paper; the
    noise is a function of (seed, step). vae: an vae.autoencoder.Autoencoder that makes posteriors of uint8 pictures.
    """
    def draw(mean, std, step):
        # The fourth key of the step: the training step splits the first three off.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 3)
        return (mean + std * jax.random.normal(key, mean.shape)) * scale

    def run(params, batch, step):
        x = batch["x"]
        if vae is not None:
            chunk = batch_size(x.shape[1])
            one = lambda image: jax.tree.map(lambda a: a[0], vae.encode(params, image[None]))
            # Each device goes through its own pictures, a few at a time: activations are large.
            x = draw(*jax.shard_map(lambda params, x: jax.lax.map(one, x, batch_size=chunk), mesh=mesh,
                                    in_specs=(P(), sharding.spec), out_specs=sharding.spec)(params, x), step)
        elif scale is not None:
            x = draw(*jnp.split(x.astype(jnp.float32), 2, axis=-1), step)
        elif x.dtype == jnp.uint8:
            x = x / jnp.float32(127.5) - 1
        return {"x": x, "y": batch["y"]}

    params = None
    if vae is not None:
        scale, params = vae.scale, jax.device_put(vae.params, NamedSharding(mesh, P()))
    run = jax.jit(run, out_shardings={"x": sharding, "y": sharding})
    return lambda batch, step: run(params, batch, step) if scale or batch["x"].dtype == jnp.uint8 else batch
