"""Builds a run from its config: mesh, data, jitted programs, samplers; and the state that it starts or resumes with."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from dit_jax import config as configs
from dit_jax.data import pipeline, sources
from dit_jax.evaluation.periodic import PeriodicEvaluation
from dit_jax.models import dit, flops
from dit_jax.parallel import chips, layout, sharding
from dit_jax.runtime import hosts
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.images import is_picture
from dit_jax.runtime.progress import say, waiting
from dit_jax.sampling.generator import Generator, Settings, guided_steps, make_sampler, whole_weights_fit
from dit_jax.training import accumulate, initialize
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.step import TrainState, from_items, init_state, make_train_step, to_items
from dit_jax.vae import files as vae_files
from dit_jax.weights.checkpoint import Checkpoints

Data = tuple[Shaped[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]  # images, labels


def make_programs(config: dict[str, Any], mesh: jax.sharding.Mesh) -> tuple[Any, Any, TrainState]:
    """Returns (init, step, target) of a config of layout.resolve_auto.

    init: jitted, init(key) -> TrainState. step: jitted, step(state, batch) -> (state, metrics); the state is donated.
    target: a TrainState of ShapeDtypeStructs with their shardings.
    """
    args: dict[str, Any] = configs.dit_args(config)
    args["sharding"] = sharding.MeshSharding(mesh, args["num_heads"])
    recipe = {field: value for field, value in config["optimizer"].items() if field != "clip"}
    optimizer = make_optimizer(**recipe, steps=config["steps"])
    step = make_train_step(
        dit.abstract(**args)[0],
        configs.objective_of(config),
        optimizer,
        seed=config["seed"],
        ema_decay=config["ema_decay"],
        label_dropout=config["diffusion"]["label_dropout"],
        num_classes=args["num_classes"],
        clip=config["optimizer"]["clip"],
        gradient=partial(
            accumulate.gradient, parts=config["accumulate"], mesh=mesh, unrolled=not config["model"]["scan"]
        ),
    )

    def init(key):
        return init_state(key, args, optimizer, configs.average_names(config))

    target = sharding.abstract_arrays(jax.eval_shape(init, jax.random.key(0)), mesh)
    shardings = sharding.shardings_of(target)
    jitted_init = jax.jit(init, out_shardings=shardings)
    jitted_step = jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return jitted_init, jitted_step, target


def check_batch(config: dict[str, Any], mesh: jax.sharding.Mesh) -> None:
    """Raises UserError if the mesh and config.accumulate do not divide the batch. config: of layout.resolve_auto."""
    batch, parts, shards = config["batch_size"], config["accumulate"], sharding.batch_shards(mesh)
    if batch % shards:
        raise UserError(f"batch_size={batch}: the mesh splits it {shards} ways, which do not divide it")
    if batch // shards % parts:
        raise UserError(
            f"accumulate={parts}: does not divide the {batch // shards} examples that each of the {shards} shards of "
            f"batch_size={batch} has"
        )


def state_from_params(params: Any, init: Callable[[jax.Array], TrainState], target: TrainState) -> TrainState:
    """The TrainState at step 0 with these parameters. init, target: of make_programs."""

    def rest(key, params):  # the compiler drops the random parameters of init, which are not used
        return replace(init(key), params=None, ema=jax.tree.map(jnp.copy, params))

    shardings = sharding.shardings_of(replace(target, params=None))
    return replace(jax.jit(rest, out_shardings=shardings)(jax.random.key(0), params), params=params)


def least_memory(config: dict[str, Any]) -> dict[str, int]:
    """{setting: bytes} that a config of layout.resolve_auto needs at least: training, grids, evaluation, judge."""
    s, e, judged, model = config["sample"], config["eval"], config["judge"]["samples"], config["model"]
    averages = len(configs.average_names(config))
    grid = min(s["classes"], model["num_classes"] or s["classes"]) * s["per_class"]
    at_once = {
        f"sample.per_class={s['per_class']}": grid if s["every"] or judged else 0,
        f"eval.batch_size={e['batch_size']}": min(e["num"], e["batch_size"]) if e["every"] else 0,
    }
    return layout.least_memory(model, config["batch_size"], model["remat"], config["accumulate"], at_once, averages) | {
        f"judge.samples={judged}": judged * 4 * model["input_size"] ** 2 * model["in_channels"],
        f"eval.num={e['num']}": e["num"] * layout.FEATURE_BYTES if e["every"] else 0,
    }


def grid_labels(config: dict[str, Any]) -> Int[np.ndarray, " n"]:
    """The labels of a grid, row by row. Without classes the grid is as large, and all labels are 0."""
    s, num_classes = config["sample"], config["model"]["num_classes"]
    classes = np.arange(min(s["classes"], num_classes)) if num_classes else np.zeros(s["classes"], int)
    return np.repeat(classes, s["per_class"])


def sample_settings(config: dict[str, Any]) -> Settings:
    """The settings of config.sample."""
    names = ("sampler", "steps", "eta", "cfg_scale", "cfg_channels", "cfg_interval")
    return Settings(seed=config["seed"], **{name: config["sample"][name] for name in names})


def make_generator(
    config: dict[str, Any],
    mesh: jax.sharding.Mesh,
    target: TrainState,
    *,
    cfg_scale: float | None = None,
    batch_size: int | None = None,
) -> Generator:
    """A Generator with the settings of config.sample, for the EMA weights of `target`. Raises UserError.

    cfg_scale: in place of the config's. batch_size: by default the images of a grid.
    """
    settings = sample_settings(config)
    if cfg_scale is not None:
        settings = replace(settings, cfg_scale=cfg_scale, cfg_interval=settings.cfg_interval if cfg_scale != 1 else "")
    args, batch_size = configs.dit_args(config), batch_size or len(grid_labels(config))
    return Generator(
        args,
        mesh,
        sharding.shardings_of(target.ema),
        objective=configs.objective_of(config),
        settings=settings,
        batch_size=batch_size,
        whole=whole_weights_fit(args, mesh, batch_size, sharding.bytes_on_a_device(target)),
    )


def network_passes(config: dict[str, Any]) -> int:
    """How many images of batch size 1 go through the network for one sample with the settings of config.sample."""
    settings = sample_settings(config)
    sampler = make_sampler(settings, configs.objective_of(config))
    if settings.cfg_scale == 1:
        return len(sampler)
    guided = guided_steps(settings.cfg_interval, sampler).sum() if settings.cfg_interval else len(sampler)
    return len(sampler) + int(guided)


@dataclass
class Run:
    """Everything that a run needs, built from its config.

    config, resolved: as given with the number of classes, and with every "auto" decided (layout.resolve_auto).
    held_out: examples, or None. init, step, target: of make_programs. model_input: of pipeline.model_input. generator,
    evaluation, decode (latents -> pictures): None if the config does not ask for them. peak, peak_source: of
    chips.peak_flops.
    """

    config: dict[str, Any]
    resolved: dict[str, Any]
    mesh: jax.sharding.Mesh
    source: sources.Source
    held_out: sources.Arrays | None
    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, pipeline.Batch], tuple[TrainState, dict[str, jax.Array]]]
    target: TrainState
    model_input: Callable[[pipeline.Batch, int], pipeline.Batch]
    generator: Generator | None
    evaluation: PeriodicEvaluation | None
    decode: Callable[[np.ndarray], np.ndarray] | None
    peak: float
    peak_source: str

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of models.dit.DiT."""
        return configs.dit_args(self.resolved)

    def batches(self, first_step: int) -> pipeline.Batches:
        """The batches of the steps from `first_step` (counted from 0) to the end."""
        c = self.config
        return pipeline.Batches(
            self.source,
            seed=c["seed"],
            flip=c["data"]["flip"],
            first_step=first_step,
            last_step=c["steps"],
            batch_size=c["batch_size"],
            sharding=sharding.batch_sharding(self.mesh),
            num_classes=c["model"]["num_classes"],
        )

    def mfu(self, images_per_second: float) -> float:
        """Model FLOPs utilization: the share of the devices' peak rate that the model's arithmetic takes."""
        passes = configs.objective_of(self.config).train_passes
        return images_per_second * flops.train_flops(passes, **self.args) / (self.peak * len(jax.devices()))

    def describe(self) -> str:
        """A line about the model, the data and the devices."""
        args, devices = self.args, jax.devices()
        params, _ = flops.num_params(**args)
        parts = f", a batch in {n} parts" if (n := self.resolved["accumulate"]) > 1 else ""
        return (
            f"{self.config['model']['name'] or 'DiT'}: {params:,d} parameters, {flops.macs(**args) / 1e9:.3g} G "
            f"multiply-adds an image, {args['dtype'].name}; {len(self.source):,d} examples of {self.source.identity}; "
            f"{len(devices)} {devices[0].device_kind} device(s), mesh {dict(self.mesh.shape)}{parts}; peak "
            f"{self.peak / 1e12:.3g} TFLOP/s a device ({self.peak_source})"
        )


@waiting("building the run")
def build(config: dict[str, Any], arrays: Data | None = None) -> Run:
    """The Run of a config of config.resolve. Every host calls it. Raises UserError naming the field.

    arrays: images and labels, in place of data.path of the source `arrays`.
    """
    model, data = config["model"], config["data"]
    resolved = layout.resolve_auto(config, jax.devices())
    mesh = sharding.make_mesh(**resolved["mesh"])
    check_batch(resolved, mesh)
    vae = vae_files.load(config["vae"]["path"]) if config["vae"]["path"] else None
    source, held_out = sources.load(
        data,
        size=model["input_size"],
        channels=model["in_channels"],
        num_classes=model["num_classes"],
        vae=vae,
        examples=arrays,
    )
    config, resolved = (configs.with_classes(c, source.class_names) for c in (config, resolved))
    if data["flip"] and not source.can_flip:
        raise UserError(
            "data.flip: mirrored latents are not the latents of the mirrored picture; add images_flipped.npy, or set "
            "data.flip=False"
        )
    if config["judge"]["samples"] and not held_out:
        raise UserError(f"judge.samples: data.source={data['source']!r} has no held-out pictures; set judge.samples=0")
    # How many parts a batch has depends on a host's memory.
    check_same_on_all(config | {"accumulate": resolved["accumulate"]}, source.identity)
    layout.check_memory(least_memory(resolved), jax.devices())
    init, step, target = make_programs(resolved, mesh)
    model_input = pipeline.model_input(
        mesh,
        sharding.batch_sharding(mesh),
        seed=config["seed"],
        scale=getattr(source, "scale", None),
        vae=vae if data["source"] in ("folder", "tfds") else None,
    )
    size = model["input_size"] * (vae.factor if vae else 1)
    decoder, generator, evaluation = vae and vae.decoder(mesh, size), None, None
    if config["sample"]["every"] or config["judge"]["samples"]:
        with prefixed("config.sample"):
            generator = make_generator(resolved, mesh, target)
    if config["eval"]["every"]:
        with prefixed("config.eval"):
            evaluation = _make_evaluation(resolved, mesh, target, decoder, size)
    peak, peak_source = chips.peak_flops(configs.dit_args(resolved)["dtype"])
    return Run(
        config=config,
        resolved=resolved,
        mesh=mesh,
        source=source,
        held_out=held_out,
        init=init,
        step=step,
        target=target,
        model_input=model_input,
        generator=generator,
        evaluation=evaluation,
        decode=decoder,
        peak=peak,
        peak_source=peak_source,
    )


@contextlib.contextmanager
def prefixed(section: str) -> Iterator[None]:
    """Puts the section of the config in front of a UserError of the block."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{section}: {e}") from None


def _make_evaluation(config, mesh, target, decoder, size):
    e = config["eval"]
    if not decoder and not is_picture(config["model"]["in_channels"]):
        raise UserError(f"every={e['every']}: latents are no pictures: name a decoder with vae.path")
    batch_size = min(e["num"], e["batch_size"])
    generator = make_generator(config, mesh, target, cfg_scale=e["cfg_scale"], batch_size=batch_size)
    decode = decoder and decoder.parts
    return PeriodicEvaluation(mesh, generator, decode, size, e["num"], e["features"], e["inception"], e["reference"])


def check_same_run(config: dict[str, Any], identity: str) -> Callable[[dict[str, Any]], None]:
    """Returns check(meta), which compares the meta of a checkpoint with this run.

    It raises UserError naming the fields that must not have changed, and prints a line for each other change. identity:
    of the data (data.sources.Source).
    """

    def check(meta):
        changed = configs.differences(meta["config"], config)
        fixed = [
            f"{field} ({old!r} there, {new!r} here)" for field, old, new in changed if configs.is_fixed(field, old, new)
        ]
        if not fixed and meta["data"] != identity:
            fixed = [f"the data ({meta['data']} there, {identity} here)"]
        if fixed:
            raise UserError(
                f"the checkpoint is of another run: {', '.join(fixed)}; use that value or another --workdir"
            )
        for field, old, new in changed:
            say(f"changed since the checkpoint: {field} {old!r} -> {new!r}")

    return check


def check_same_on_all(config: dict[str, Any], identity: str) -> None:
    """Raises UserError if this host was started with another config than the first host, or has other data."""
    first_config, first_identity = hosts.share((config, identity))[0]
    differ = [
        f"{field} ({old!r} there, {new!r} here)"
        for field, old, new in configs.differences(first_config, config)
        if field != "data.path"
    ]
    if first_identity != identity:
        differ.append(f"the data ({first_identity} there, {identity} here)")
    if differ:
        raise UserError(f"not the run of the first host: {', '.join(differ)}")


@waiting("reading the checkpoint, or drawing the first weights")
def restore_or_init(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """Returns (state, meta) of the newest checkpoint, or of a new run if there is none.

    Raises UserError if the checkpoint is of another run, or past its last step.
    """
    config = run.config
    restored = checkpoints.restore_latest(to_items(run.target), check_same_run(config, run.source.identity))
    if restored:
        items, meta = restored
        state = from_items(items)
        step = int(state.step)
        if step > config["steps"]:
            raise UserError(
                f"steps={config['steps']}: the checkpoint in {checkpoints.directory} is already at step {step}; set "
                "steps higher"
            )
        say(f"resuming from step {step} of {config['steps']}")
        return state, meta
    meta: dict[str, Any] = {"train_seconds": 0.0}
    if config["init"]["weights"]:
        params, meta["init"] = initialize.initial_params(
            **config["init"], args=run.args, mesh=run.mesh, seed=config["seed"]
        )
        return state_from_params(params, run.init, run.target), meta
    return run.init(jax.random.key(config["seed"])), meta
