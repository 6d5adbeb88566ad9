"""Weights, labels and indices -> images, over the mesh. """

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.diffusion import samplers
from dit_jax.diffusion.guidance import MAX_SCALE, forward_with_cfg
from dit_jax.diffusion.process import linear_schedule, respace
from dit_jax.models import dit
from dit_jax.parallel import sharding
from dit_jax.runtime.errors import UserError


def guided(model, labels, null, cfg_scale, cfg_channels):
    """model(x, t, y) -> model(x, t) of `labels` under guidance (cfg_channels None: of all), on a doubled batch, whose second
    half is of the class `null`. cfg_scale 1: without guidance, on the batch as it is."""
    if cfg_scale == 1:
        return lambda x, t: model(x, t, labels)
    y = jnp.concatenate([labels, jnp.full_like(labels, null)])

    def model_fn(x, t):
        x, t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
        return forward_with_cfg(model, x, t, y, cfg_scale, cfg_channels)[: len(labels)]

    return model_fn


class Generator:
    """generator(params, labels, indices) -> images (N, H, W, C) float32 in host memory.

    The noise of an image is a function of (seed, its index) alone, so that the image is the same, up to rounding,
    in whatever batch and on whatever devices it is made.

    args: of models.dit.DiT; where num_classes is 0, all labels are 0. params_sharding: a tree like params.
    cfg_scale 1 runs without guidance; cfg_channels None guides all. batch_size: images that go through the network at
    once (rounded up to what the mesh divides). on_step(step): called after each denoising step, then a program of its
    own: one that calls back to the host is not kept by JAX's compilation cache.
    Raises UserError naming the setting that is out of range.
    """

    def __init__(self, args, mesh, params_sharding, *, timesteps, steps, sampler, eta, cfg_scale, cfg_channels, seed,
                 batch_size, on_step=None):
        if cfg_scale != 1 and not args["null_class"]:
            raise UserError(f"cfg_scale={cfg_scale}: guidance needs a null class, and this model was trained without "
                             "label dropout; use cfg_scale=1")
        if cfg_scale != 1 and not args["num_classes"]:
            raise UserError(f"cfg_scale={cfg_scale}: guidance needs classes, and this model has none (it is "
                             "unconditional); use cfg_scale=1")
        if not 0 <= cfg_scale <= MAX_SCALE:
            raise UserError(f"cfg_scale={cfg_scale}: must be between 0 and {MAX_SCALE}")
        if not 0 <= eta <= 1:
            raise UserError(f"eta={eta}: must be between 0 and 1")
        if cfg_channels is not None and cfg_channels < 1:
            raise UserError(f"cfg_channels={cfg_channels}: must be at least 1, or 0 for all")
        graphdef = dit.abstract(**args | {"sharding": sharding.MeshSharding(mesh, args["num_heads"])})[0]
        self.num_classes = args["num_classes"]
        self.schedule = respace(linear_schedule(timesteps), steps)
        shards = sharding.batch_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards
        shape = (args["input_size"], args["input_size"], args["in_channels"])

        def noise_of(indices):
            keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(indices)
            return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)

        def model_fn(params, labels):
            return guided(nnx.merge(graphdef, params), labels, self.num_classes, cfg_scale, cfg_channels)

        def start(indices):
            return noise_of(indices)(len(self.schedule))

        def step(params, labels, indices, x, i):
            return samplers.step(self.schedule, model_fn(params, labels), x, i, noise_of(indices), sampler, eta)

        def run(params, labels, indices):
            noise = noise_of(indices)
            return samplers.sample(self.schedule, model_fn(params, labels), noise(len(self.schedule)), noise, sampler, eta)

        batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self.batch_sharding, self.on_step = batch, on_step
        self.start = jax.jit(start, in_shardings=batch, out_shardings=batch)
        self.step = jax.jit(step, in_shardings=(params_sharding, batch, batch, batch, whole), out_shardings=batch)
        self.whole = jax.jit(lambda x: x, out_shardings=whole)
        self.run = jax.jit(run, in_shardings=(params_sharding, batch, batch), out_shardings=whole)

    def __call__(self, params, labels, indices):
        labels, indices = np.asarray(labels, np.int32), np.asarray(indices, np.uint32)
        if labels.min() < 0 or labels.max() >= max(self.num_classes, 1):
            raise UserError(f"class {labels.max() if labels.min() >= 0 else labels.min()}: this model has classes "
                             f"0 to {max(self.num_classes, 1) - 1}")
        images = []
        for start in range(0, len(labels), self.batch_size):
            # The last batch is filled up, so that one compiled program serves all.
            part = [np.resize(a[start: start + self.batch_size], self.batch_size) for a in (labels, indices)]
            part = [sharding.put(a, self.batch_sharding) for a in part]
            images.append(np.asarray(self._run_in_steps(params, *part) if self.on_step else self.run(params, *part)))
        return np.concatenate(images)[: len(labels)]

    def _run_in_steps(self, params, labels, indices):
        x, steps = self.start(indices), len(self.schedule)
        for k in range(steps):
            x = self.step(params, labels, indices, x, np.int32(steps - 1 - k))
            x.block_until_ready()
            self.on_step(k + 1)
        return self.whole(x)
