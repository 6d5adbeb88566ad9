"""Batches. Their order and flips are a function of (seed, step) alone.

Row r of the global batch of step s is element s * B + r of one endless sequence, in which every epoch is its own
permutation of the examples. Each process reads only the rows that its devices hold. So any number of hosts and devices
sees the same batches, and a checkpoint needs only the step to continue with the data.
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int

from dit_jax.data.sources import Source
from dit_jax.runtime.errors import UserError
from dit_jax.vae.autoencoder import Autoencoder, batch_size

Batch = dict[str, jax.Array]  # "x": (B, ...), "y": (B,)


@functools.lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> Int[np.ndarray, " length"]:
    # NumPy promises never to change the raw random bits; its own shuffle may change.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(length), kind="stable")


def order(
    length: int, seed: int, flip: bool, step: int, batch_size: int, rows: Sequence[int] | Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Returns (indices, flips) of rows of the global batch of `step`: which examples of a source of `length` they are,
    and which of them are mirrored."""
    rows = np.asarray(rows)
    epochs, positions = np.divmod(step * batch_size + rows, length)
    indices = np.empty(len(rows), np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = _permutation(length, seed, int(epoch))[positions[in_epoch]]
    # Drawn for the whole batch, so that a flip does not depend on which rows are read here.
    if flip:
        flips = np.random.Generator(np.random.Philox(key=[seed, step])).random(batch_size) < 0.5
    else:
        flips = np.zeros(batch_size, bool)
    return indices, flips[rows]


def _check_labels(source: Source, indices: np.ndarray, y: np.ndarray, num_classes: int) -> None:
    """Raises UserError if a label is not in 0 ... num_classes - 1. The label `num_classes` is the null class, and -1
    wraps around to it: training on them would be wrong without an error."""
    wrong = (y < 0) | (y >= num_classes)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise UserError(
            f"{source.identity}: example {indices[first]} has the label {y[first]}, but model.num_classes="
            f"{num_classes} has 0 to {num_classes - 1}"
        )


def global_batch(
    source: Source,
    step: int,
    *,
    seed: int,
    flip: bool,
    batch_size: int,
    sharding: NamedSharding,
    num_classes: int = 0,
) -> Batch:
    """Returns the batch of `step` as global arrays {"x": (B, ...) as the source stores it, "y": (B,) int32}.

    num_classes: if it is not 0, the labels are checked against it. Raises UserError naming the example.
    """
    held: Any = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({row for (part,) in held for row in range(*part.indices(batch_size))})
    indices, flips = order(len(source), seed, flip, step, batch_size, rows)
    examples = source.examples(indices, flips)
    if num_classes:
        _check_labels(source, indices, examples["y"], num_classes)

    def to_global(values):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            first = rows.index(start)
            return values[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

    return {name: to_global(values) for name, values in examples.items()}


class Batches:
    """The batches of steps first_step ... last_step - 1. Threads read `ahead` of them in advance and send them to the
    devices. To be closed.

    kwargs: of global_batch. Attribute `waited`: the seconds in which the devices were idle for want of a batch.
    """

    def __init__(self, source: Source, *, first_step: int, last_step: int, ahead: int = 3, **kwargs: Any):
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(2)  # one reads while the other checks what it has read
        steps = range(first_step, last_step)
        self._coming = (self._pool.submit(global_batch, source, step, **kwargs) for step in steps)
        self._ready = deque(itertools.islice(self._coming, ahead))

    def get(self, running: Any = None) -> Batch:
        """Returns the next batch, or raises what reading it raised. running: arrays that the devices still compute."""
        future = self._ready.popleft()
        if not future.done():
            jax.block_until_ready(running)
            start = time.perf_counter()
            wait([future])
            self.waited += time.perf_counter() - start
        self._ready.extend(itertools.islice(self._coming, 1))
        return future.result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _posteriors(vae: Autoencoder, mesh: Mesh, sharding: NamedSharding, params: Any, pictures: jax.Array):
    """Returns (mean, standard deviation) of the posteriors of a batch of pictures. Each device encodes its own
    pictures, a few at a time because activations are large."""

    def encode_share(params, pictures):
        encode_one = lambda picture: jax.tree.map(lambda a: a[0], vae.encode(params, picture[None]))
        return jax.lax.map(encode_one, pictures, batch_size=batch_size(pictures.shape[1]))

    spec = sharding.spec
    return jax.shard_map(encode_share, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)(params, pictures)


def model_input(
    mesh: Mesh, sharding: NamedSharding, *, seed: int, scale: float | None = None, vae: Autoencoder | None = None
) -> Callable[[Batch, int], Batch]:
    """Returns a function (batch, step) -> the batch with x (B, H, W, C) float32 as the model takes it, on the devices.

    Latents are drawn from their posteriors anew at every step, as in the paper. The noise depends only on (seed, step).

    Args:
        scale: for a source of posteriors [mean, standard deviation], the factor by which latents are multiplied.
        vae: for a source of uint8 pictures, the autoencoder that makes their posteriors and has the scale.
    """
    scale = scale if vae is None else vae.scale
    params = None if vae is None else jax.device_put(vae.params, NamedSharding(mesh, PartitionSpec()))

    def draw(mean, std, step):
        # The fourth key of the step: the training step splits off the first three.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 3)
        return (mean + std * jax.random.normal(key, mean.shape)) * scale

    def run(params, batch, step):
        x = batch["x"]
        if vae is not None:
            mean, std = _posteriors(vae, mesh, sharding, params, x)
            x = draw(mean, std, step)
        elif scale is not None:
            mean, std = jnp.split(x.astype(jnp.float32), 2, axis=-1)
            x = draw(mean, std, step)
        elif x.dtype == jnp.uint8:
            x = x / jnp.float32(127.5) - 1
        return {"x": x, "y": batch["y"]}

    run = jax.jit(run, out_shardings={"x": sharding, "y": sharding})
    return lambda batch, step: run(params, batch, step) if scale or batch["x"].dtype == jnp.uint8 else batch
