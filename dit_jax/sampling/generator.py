"""The jitted sampler over the mesh: weights, labels and indices -> images."""

import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from dit_jax.diffusion import catalog, samplers
from dit_jax.diffusion.guidance import MAX_SCALE, guide
from dit_jax.diffusion.meanflow import MeanFlow
from dit_jax.diffusion.objectives import Objective
from dit_jax.models import dit
from dit_jax.parallel import layout, sharding
from dit_jax.parallel.sharding import BATCH, P
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.overlap import in_flight
from dit_jax.runtime.progress import say

# Denoising steps that are started before the first of them is waited for: work for the devices while a batch is saved.
STEPS_AHEAD = 8


@dataclass(frozen=True)
class Settings:
    """How samples are made. The fields are named like the flags of dit_jax.sample.

    sampler: a name of diffusion.catalog, with its options. steps: evaluations of the network; for ddpm and ddim also
    "a,b,c" or "ddimN" (diffusion.process.kept_timesteps). eta: noise of DDIM. cfg_scale: 1 is no guidance.
    cfg_channels: guides only the first channels; 0 guides all. cfg_interval: "LOW,HIGH", the times of the network
    between which a step is guided; "": all.
    """

    seed: int = 0
    sampler: str = "ddpm"
    steps: str = "250"
    eta: float = 0.0
    cfg_scale: float = 4.0
    cfg_channels: int = 3
    cfg_interval: str = ""

    @property
    def compiled(self) -> tuple:
        """The settings that are compiled into the sampler. The others are arguments of the program."""
        return self.sampler, self.steps, self.eta, self.cfg_channels, self.cfg_scale != 1, bool(self.cfg_interval)


class Request(NamedTuple):
    """The arguments of the compiled sampler for one batch: arrays, their shapes or their shardings.

    labels (n,) int32 and indices (n,) uint32 of the images. seed () uint32. cfg_scale () float32. guided (evaluations,)
    bool: whether an evaluation is guided; None if all are.
    """

    labels: Any
    indices: Any
    seed: Any
    cfg_scale: Any
    guided: Any = None


class Work(NamedTuple):
    """What was started on the devices: a denoising step, or with `images` the end of a batch of so many."""

    arrays: Any
    images: int


class Guide(NamedTuple):
    """A second network that guides the first (autoguidance): the arguments of models.dit.DiT, and its parameters."""

    args: dict[str, Any]
    params: Any


def make_sampler(settings: Settings, objective: Objective) -> samplers.Sampler:
    """The sampler of these settings. Raises UserError."""
    eta = {"eta": settings.eta} if settings.eta and settings.sampler.partition(":")[0] == "ddim" else {}
    return catalog.make(settings.sampler, objective, settings.steps, **eta)


def guided_steps(interval: str, sampler: samplers.Sampler) -> Bool[np.ndarray, " n"]:
    """Whether each evaluation is guided: where the time at the beginning of its step lies in "LOW,HIGH".

    All evaluations of a step are alike, as in the interval's paper and in REPA. LightningDiT decides at each of them.
    Raises UserError naming cfg_interval.
    """
    try:
        low, high = map(float, interval.split(","))
    except ValueError:
        low, high = np.nan, np.nan
    if not low <= high:
        raise UserError(f"cfg_interval={interval!r}: must be LOW,HIGH, two times of the objective, as in 0.2,0.8")
    first = np.searchsorted(sampler.steps, sampler.steps)  # the first evaluation of each one's step
    times = sampler.times[first]
    slack = 1e-9 * np.maximum(1, np.abs(times))  # a bound on a step's time includes it, however both are rounded
    return (times >= low - slack) & (times <= high + slack)


def is_whole(value: Any) -> bool:
    """Returns whether this is an integer, Python's or NumPy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check(settings: Settings, args: dict[str, Any], objective: Objective, guide: bool = False) -> None:
    """Raises UserError naming a setting that is out of range, or that does not fit a DiT with the arguments `args`.

    guide: whether a second network guides.
    """
    scale = settings.cfg_scale
    for name in ("seed", "cfg_channels"):
        if not is_whole(getattr(settings, name)):
            raise UserError(f"{name}={getattr(settings, name)!r}: must be a whole number")
    for name in ("sampler", "steps", "cfg_interval"):
        if not isinstance(getattr(settings, name), str):
            raise UserError(f"{name}={getattr(settings, name)!r}: must be a text")
    for name in ("cfg_scale", "eta"):
        if not isinstance(getattr(settings, name), (int, float, np.number)):
            raise UserError(f"{name}={getattr(settings, name)!r}: must be a number")
    sampler = settings.sampler.partition(":")[0]
    if settings.eta and sampler not in ("ddim", "ddpm"):
        raise UserError(f"eta={settings.eta}: is the noise of ddim, and sampler={sampler} has none; leave it out")
    trained_in = isinstance(objective, MeanFlow) and (objective.omega, objective.kappa) != (1, 0)
    if scale != 1 and sampler == "meanflow" and trained_in and not guide:
        raise UserError(
            f"cfg_scale={scale}: sampler=meanflow is guided by what was trained in; use cfg_scale=1, or another sampler"
        )
    if settings.cfg_interval and scale == 1:
        raise UserError(f"cfg_interval={settings.cfg_interval}: is for guidance, and cfg_scale=1 is none")
    if guide and scale == 1:
        raise UserError("guide: a second network guides, and cfg_scale=1 is no guidance; use another scale")
    if scale != 1 and not guide and not args["null_class"]:
        raise UserError(
            f"cfg_scale={scale}: guidance needs a null class, and this model was trained without label dropout; use "
            "cfg_scale=1"
        )
    if scale != 1 and not guide and not args["num_classes"]:
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


class Generator:
    """generator(params, labels, indices) -> images (N, H, W, C) float32 in host memory.

    The noise of an image depends only on (seed, its index): the image is the same, up to rounding, in any batch and on
    any devices. Labels, indices, seed and guidance scale are arguments of the compiled program: new values compile
    nothing.

    Args:
      args: of models.dit.DiT. If num_classes is 0, all labels are 0.
      params_sharding: a tree of shardings like the parameters.
      objective: of the network.
      guide: a second network, or None. Its parameters are sharded like its `params`.
      batch_size: images that go through the network at once; rounded up to a multiple that the mesh can split.
      on_step: called as on_step(steps) with the number of denoising steps that a call has finished, after each. Each
        step is then a program of its own, because JAX does not cache a program that calls back to the host.
      whole: whether each device has all weights, in the compute dtype, and samples images of its own
        (whole_weights_fit). Else the weights are split as they are given, and so is each layer's work.
    Attributes: batch_size; mesh, on which it samples; waited, the seconds in which the devices had nothing to do while
      the caller was busy with a batch, at most.
    Raises: UserError naming the setting that is out of range.
    """

    def __init__(
        self,
        args: dict[str, Any],
        mesh: jax.sharding.Mesh,
        params_sharding: Any,
        *,
        objective: Objective,
        settings: Settings,
        batch_size: int,
        guide: Guide | None = None,
        on_step: Callable[[int], None] | None = None,
        whole: bool = False,
    ):
        check(settings, args, objective, bool(guide))
        mesh = sharding.data_mesh(mesh) if whole else mesh
        self.args, self.settings, self.objective, self.on_step, self.mesh = args, settings, objective, on_step, mesh
        self.num_classes, self.guide, self.whole, self.waited = args["num_classes"], guide, whole, 0.0
        self._newest = Work((), 0)  # the last that was started
        self.sampler = sampler = make_sampler(settings, objective)
        if settings.cfg_interval:
            if not guided_steps(settings.cfg_interval, sampler).any():  # refuses a wrong one at once
                say(f"cfg_interval={settings.cfg_interval}: no step begins there, so nothing is guided")
        shards = sharding.batch_shards(mesh)
        self.batch_size = -(-batch_size // shards) * shards
        shape = (args["input_size"], args["input_size"], args["in_channels"])
        model_fn = _model_fn(args, None if whole else mesh, settings, guide)

        def noise_of(request):
            keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(request.seed), index))(request.indices)
            return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)

        def start(request):
            return sampler.init(noise_of(request))

        def step(params, request, state, i):
            return sampler.step(model_fn(params, request), state, i, noise_of(request))

        def run(params, request):
            return samplers.sample(sampler, model_fn(params, request), noise_of(request))

        batch, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self.shardings = Request(batch, batch, replicated, replicated, replicated if settings.cfg_interval else None)
        if guide:
            params_sharding = params_sharding, sharding.shardings_of(guide.params)
        if whole:
            split, params_sharding = params_sharding, replicated
            # Cast while it is still split, so that the smaller type travels.
            cast = lambda weights: jax.lax.with_sharding_constraint(self._cast(weights), split)
            self.lay_whole = jax.jit(cast, in_shardings=(split,), out_shardings=replicated)
            # The program of one device, on each. Left to itself, XLA moves the images that guidance doubles.
            of, each = jax.tree.map(lambda s: s.spec, self.shardings), partial(sharding.on_each_device, mesh=mesh)
            start, step, run = each(start, of), each(step, P(), of, BATCH, P()), each(run, P(), of)
        self.start = jax.jit(start, in_shardings=(self.shardings,), out_shardings=batch)
        step_shardings = params_sharding, self.shardings, batch, replicated
        self.step = jax.jit(step, in_shardings=step_shardings, out_shardings=batch)
        self.result = jax.jit(sampler.result, out_shardings=replicated)
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
        if settings.cfg_interval:
            values += (guided_steps(settings.cfg_interval, self.sampler),)
        return Request(*(sharding.put(np.asarray(a), s) for a, s in zip(values, self.shardings)))

    def abstract_request(self) -> Request:
        """A Request of ShapeDtypeStructs with their shardings."""
        n, on = self.batch_size, self.shardings
        return Request(
            jax.ShapeDtypeStruct((n,), np.int32, sharding=on.labels),
            jax.ShapeDtypeStruct((n,), np.uint32, sharding=on.indices),
            jax.ShapeDtypeStruct((), np.uint32, sharding=on.seed),
            jax.ShapeDtypeStruct((), np.float32, sharding=on.cfg_scale),
            on.guided and jax.ShapeDtypeStruct((len(self.sampler),), bool, sharding=on.guided),
        )

    def abstract_weights(self, params: Any) -> Any:
        """The weights that `step` and `run` take, as ShapeDtypeStructs with their shardings. params: as such, too."""
        weights = (params, self.guide.params) if self.guide else params
        if not self.whole:
            return weights
        whole = sharding.replicated(self.mesh)
        shapes = jax.eval_shape(self._cast, weights)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes)

    def _cast(self, weights):
        if not self.guide:
            return dit.cast_kernels(weights, self.args["dtype"])
        params, second = weights
        return dit.cast_kernels(params, self.args["dtype"]), dit.cast_kernels(second, self.guide.args["dtype"])

    def __call__(
        self,
        params: Any,
        labels: Int[np.ndarray, " n"],
        indices: Int[np.ndarray, " n"],
        settings: Settings | None = None,
    ) -> Float[np.ndarray, "n h w c"]:
        """The images of these labels and indices. Raises UserError. The arguments are those of `batches`."""
        return np.concatenate([images for images, _ in self.batches(params, labels, indices, settings)])

    def batches(
        self,
        params: Any,
        labels: Int[np.ndarray, " n"],
        indices: Int[np.ndarray, " n"],
        settings: Settings | None = None,
        decode: Callable[[jax.Array], Iterable[jax.Array]] | None = None,
        shown: Container[int] = (),
    ) -> Iterator[tuple[Float[np.ndarray, "m h w c"], Float[np.ndarray, "m H W c"] | None]]:
        """Yields (images, images decoded or None) of these labels and indices, a batch at a time, in host memory.

        While the caller is busy with a batch, the devices work on the next one. Raises UserError.

        settings: replace the generator's; those that are compiled in (Settings.compiled) must be the same.
        decode: as vae.autoencoder.Decoder.parts.
        shown: numbers of evaluations, from 0 for the noise, after which a batch is yielded unfinished as well.
        """
        labels, indices = np.asarray(labels), np.asarray(indices)
        if settings is not None:
            check(settings, self.args, self.objective, bool(self.guide))
            assert settings.compiled == self.settings.compiled
        highest = max(self.num_classes, 1) - 1
        wrong = labels[(labels < 0) | (labels > highest)]
        if wrong.size:
            raise UserError(f"class {wrong[0]}: this model has classes 0 to {highest}")
        weights = (params, self.guide.params) if self.guide else params
        weights = self.lay_whole(weights) if self.whole else weights
        started, steps = self._started(weights, labels, indices, settings, decode, shown), 0
        for work in in_flight(started, STEPS_AHEAD if self.on_step else 1, _is_ready):
            if not work.images:
                jax.block_until_ready(work.arrays)
                steps += 1
                if self.on_step:
                    self.on_step(steps)
                continue
            images, decoded = jax.tree.map(np.asarray, work.arrays)
            before = time.perf_counter()
            yield images[: work.images], np.concatenate(decoded)[: work.images] if decoded else None
            if _is_ready(self._newest):
                self.waited += time.perf_counter() - before

    def _started(self, weights, labels, indices, settings, decode, shown):
        """Yields each Work when it is started."""

        def start(arrays, images=0):
            self._newest = Work(arrays, images)
            return self._newest

        def start_decoding(images, count):
            parts = decode(images if count == self.batch_size else images[:count]) if decode else ()
            return start((images, list(parts)), count)

        for first in range(0, len(labels), self.batch_size):
            part = slice(first, first + self.batch_size)
            request, count = self.request(labels[part], indices[part], settings), len(labels[part])
            if self.on_step or shown:
                state = self.start(request)
                for i in range(len(self.sampler)):
                    if i in shown:
                        yield start_decoding(self.result(state), count)
                    state = self.step(weights, request, state, np.int32(i))
                    yield start(state)
                yield start_decoding(self.result(state), count)
            else:
                yield start_decoding(self.run(weights, request), count)


def _is_ready(work):
    return all(a.is_ready() for a in jax.tree.leaves(work.arrays))


def whole_weights_fit(
    args: dict[str, Any], mesh: jax.sharding.Mesh, images: int, held: int, guide: Guide | None = None
) -> bool:
    """Returns whether a Generator of these arguments is to have `whole` weights: layout.whole_weights_fit.

    images: at once. held: bytes of a device that are taken already.
    """
    weights = 0
    for network in (args, guide.args) if guide else (args,):
        shapes = jax.eval_shape(partial(dit.cast_kernels, dtype=network["dtype"]), dit.abstract(**network)[1])
        weights += sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
    return layout.whole_weights_fit(args, list(mesh.devices.flat), images, weights, held)


def _model_fn(args, mesh, settings, second):
    """Returns model_fn(params, request) -> model(x, t, h, i), guided as the settings say.

    mesh: None on one device. second: a Guide, or None.
    """

    def network_of(args):
        on_mesh = {"sharding": sharding.MeshSharding(mesh, args["num_heads"])} if mesh else {}
        graphdef = dit.abstract(**args | on_mesh)[0]
        return lambda params: nnx.merge(graphdef, params)

    build, second_time = network_of(args), args.get("second_time", False)
    build_second = second and network_of(second.args)

    def model_fn(params, request):
        if build_second:
            params, second_params = params
            reference = build_second(second_params)
        else:
            reference = None
        network, y = build(params), request.labels
        if settings.cfg_scale == 1:
            return lambda x, t, h, i: network(x, t, y, h) if second_time else network(x, t, y)
        guided = guide(network, y, args["num_classes"], request.cfg_scale, settings.cfg_channels, reference=reference)

        def model(x, t, h, i):
            on = True if request.guided is None else request.guided[i]
            return guided(x, t, h, on=on) if second_time else guided(x, t, on=on)

        return model

    return model_fn
