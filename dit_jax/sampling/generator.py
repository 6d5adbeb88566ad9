"""The jitted sampler over the mesh: weights, labels and indices -> images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_jax.diffusion import samplers
from dit_jax.diffusion.guidance import MAX_SCALE, forward_with_cfg
from dit_jax.diffusion.process import linear_schedule, respace
from dit_jax.models import dit
from dit_jax.parallel import sharding
from dit_jax.runtime.errors import UserError


@dataclass(frozen=True)
class Settings:
    """How samples are made. The fields are named like the flags of dit_jax.sample.

    steps: a number, "a,b,c" or "ddimN" (diffusion.process.kept_timesteps). eta: noise of DDIM. cfg_scale: 1 is no
    guidance. cfg_channels: guides only the first channels of epsilon; 0 guides all.
    """

    seed: int = 0
    sampler: str = "ddpm"
    steps: str = "250"
    eta: float = 0.0
    cfg_scale: float = 4.0
    cfg_channels: int = 3

    @property
    def compiled(self) -> tuple:
        """The settings that are compiled into the sampler. The others are arguments of the program."""
        return self.sampler, self.steps, self.eta, self.cfg_channels, self.cfg_scale != 1


class Request(NamedTuple):
    """The arguments of the compiled sampler for one batch: arrays, their shapes or their shardings.

    labels (n,) int32 and indices (n,) uint32 of the images. seed () uint32. cfg_scale () float32.
    """

    labels: Any
    indices: Any
    seed: Any
    cfg_scale: Any


def is_whole(value: Any) -> bool:
    """Returns whether this is an integer, Python's or NumPy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check(settings: Settings, args: dict[str, Any]) -> None:
    """Raises UserError naming a setting that is out of range, or that does not fit a DiT with the arguments `args`."""
    scale = settings.cfg_scale
    for name in ("seed", "cfg_channels"):
        if not is_whole(getattr(settings, name)):
            raise UserError(f"{name}={getattr(settings, name)!r}: must be a whole number")
    for name in ("cfg_scale", "eta"):
        if not isinstance(getattr(settings, name), (int, float, np.number)):
            raise UserError(f"{name}={getattr(settings, name)!r}: must be a number")
    if scale != 1 and not args["null_class"]:
        raise UserError(
            f"cfg_scale={scale}: guidance needs a null class, and this model was trained without label dropout; use "
            "cfg_scale=1"
        )
    if scale != 1 and not args["num_classes"]:
        raise UserError(
            f"cfg_scale={scale}: guidance needs classes, and this model has none (it is unconditional); use cfg_scale=1"
        )
    if not 0 <= scale <= MAX_SCALE:
        raise UserError(f"cfg_scale={scale}: must be between 0 and {MAX_SCALE}")
    if not 0 <= settings.eta <= 1:
        raise UserError(f"eta={settings.eta}: must be between 0 and 1")
    if settings.cfg_channels < 0:
        raise UserError(f"cfg_channels={settings.cfg_channels}: must be at least 1, or 0 for all")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"seed={settings.seed}: must be at least 0, and below 2**32")


def guided(
    model: Callable[[Array, Array, Array], Array],
    labels: Int[Array, " n"],
    null: int,
    cfg_scale: Float[Array, ""] | float,
    cfg_channels: int,
) -> Callable[[Array, Array], Array]:
    """Returns a function (x, t) -> the output of model(x, t, y) for `labels` with classifier-free guidance.

    The batch is doubled; its second half is of the class `null`. cfg_channels: 0 guides all channels.
    """
    y = jnp.concatenate([labels, jnp.full_like(labels, null)])

    def model_fn(x, t):
        x, t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
        return forward_with_cfg(model, x, t, y, cfg_scale, cfg_channels or None)[: len(labels)]

    return model_fn


class Generator:
    """generator(params, labels, indices) -> images (N, H, W, C) float32 in host memory.

    The noise of an image depends only on (seed, its index): the image is the same, up to rounding, in any batch and on
    any devices. Labels, indices, seed and guidance scale are arguments of the compiled program: new values compile
    nothing.

    Args:
      args: of models.dit.DiT. If num_classes is 0, all labels are 0.
      params_sharding: a tree of shardings like the parameters.
      timesteps: of the diffusion process.
      batch_size: images that go through the network at once; rounded up to a multiple that the mesh can split.
      on_step: called as on_step(step) after each denoising step, counted from 1. Each step is then a program of its
        own, because JAX does not cache a program that calls back to the host.
    Raises: UserError naming the setting that is out of range.
    """

    def __init__(
        self,
        args: dict[str, Any],
        mesh: jax.sharding.Mesh,
        params_sharding: Any,
        *,
        timesteps: int,
        settings: Settings,
        batch_size: int,
        on_step: Callable[[int], None] | None = None,
    ):
        check(settings, args)
        graphdef = dit.abstract(**args | {"sharding": sharding.MeshSharding(mesh, args["num_heads"])})[0]
        self.args, self.settings, self.on_step, self.mesh = args, settings, on_step, mesh
        self.num_classes = args["num_classes"]
        self.schedule = respace(linear_schedule(timesteps), settings.steps)
        shards = sharding.batch_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards
        shape = (args["input_size"], args["input_size"], args["in_channels"])
        sampler, eta, last = settings.sampler, settings.eta, len(self.schedule)
        guides = settings.cfg_scale != 1

        def noise_of(request):
            keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(request.seed), index))(request.indices)
            return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)

        def model_fn(params, request):
            model = nnx.merge(graphdef, params)
            if not guides:
                return lambda x, t: model(x, t, request.labels)
            return guided(model, request.labels, self.num_classes, request.cfg_scale, settings.cfg_channels)

        def start(request):
            return noise_of(request)(last)

        def step(params, request, x, i):
            return samplers.step(self.schedule, model_fn(params, request), x, i, noise_of(request), sampler, eta)

        def run(params, request):
            noise = noise_of(request)
            return samplers.sample(self.schedule, model_fn(params, request), noise(last), noise, sampler, eta)

        batch, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self.shardings = Request(batch, batch, replicated, replicated)
        step_shardings = params_sharding, self.shardings, batch, replicated
        self.start = jax.jit(start, in_shardings=(self.shardings,), out_shardings=batch)
        self.step = jax.jit(step, in_shardings=step_shardings, out_shardings=batch)
        self.whole = jax.jit(lambda x: x, out_shardings=replicated)
        self.run = jax.jit(run, in_shardings=(params_sharding, self.shardings), out_shardings=replicated)

    def request(
        self, labels: Int[np.ndarray, " n"], indices: Int[np.ndarray, " n"], settings: Settings | None = None
    ) -> Request:
        """The Request of batch_size images, on the mesh. Fewer labels and indices are repeated up to that number."""
        settings = settings or self.settings
        values = (
            np.resize(np.asarray(labels, np.int32), self.batch_size),
            np.resize(np.asarray(indices, np.uint32), self.batch_size),
            np.uint32(settings.seed),
            np.float32(settings.cfg_scale),
        )
        return Request(*(sharding.put(np.asarray(a), s) for a, s in zip(values, self.shardings)))

    def abstract_request(self) -> Request:
        """A Request of ShapeDtypeStructs with their shardings."""
        n, on = self.batch_size, self.shardings
        return Request(
            jax.ShapeDtypeStruct((n,), np.int32, sharding=on.labels),
            jax.ShapeDtypeStruct((n,), np.uint32, sharding=on.indices),
            jax.ShapeDtypeStruct((), np.uint32, sharding=on.seed),
            jax.ShapeDtypeStruct((), np.float32, sharding=on.cfg_scale),
        )

    def __call__(
        self,
        params: Any,
        labels: Int[np.ndarray, " n"],
        indices: Int[np.ndarray, " n"],
        settings: Settings | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """The images of these labels and indices. Raises UserError.

        settings: replace the generator's; those that are compiled in (Settings.compiled) must be the same.
        """
        labels, indices = np.asarray(labels), np.asarray(indices)
        if settings is not None:
            check(settings, self.args)
            assert settings.compiled == self.settings.compiled
        highest = max(self.num_classes, 1) - 1
        if labels.min() < 0 or labels.max() > highest:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise UserError(f"class {wrong}: this model has classes 0 to {highest}")
        images = []
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            request = self.request(labels[part], indices[part], settings)
            if self.on_step:
                images.append(np.asarray(self._run_in_steps(params, request, self.on_step)))
            else:
                images.append(np.asarray(self.run(params, request)))
        return np.concatenate(images)[: len(labels)]

    def _run_in_steps(self, params, request, on_step):
        x, steps = self.start(request), len(self.schedule)
        for k in range(steps):
            x = self.step(params, request, x, np.int32(steps - 1 - k))
            x.block_until_ready()
            on_step(k + 1)
        return self.whole(x)
