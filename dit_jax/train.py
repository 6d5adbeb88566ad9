"""Trains a DiT: python -m dit_jax.train --config=configs/digits.py --workdir=runs/digits [--config.a.b=c]

The same command again goes on where the newest checkpoint stands, and ends with the same parameters to the bit.
"""

from dit_jax import cli

from absl import flags

if __name__ == "__main__":
    cli.define_config()
    cli.define_path("workdir", None, "the run's folder: made, or gone on with")
    flags.DEFINE_string("profile", None, "START:STOP: a trace of these steps, in WORKDIR/profile")
    flags.DEFINE_bool("debug_nans", False, "stop at the first operation that makes a NaN, with a traceback; slow")
    cli.define_hosts()
    cli.parse()  # above the imports that take time

import math
import os
import signal
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import autoencoder, config as configs, finetune, flops, hosts, layout, pictures, sharding
from dit_jax.checkpoint import Checkpoints
from dit_jax.config import UserError
from dit_jax.data import pipeline, sources
from dit_jax.diffusion.schedule import linear_schedule
from dit_jax.generate import Generator
from dit_jax.logging import Metrics, Progress, duration, say
from dit_jax.models import dit
from dit_jax.profiling import Trace, keep_compiled
from dit_jax.state import init_state, make_optimizer, make_train_step
from dit_jax.runtime import ending, files
from dit_jax.runtime.files import write_aside


def make_programs(config, mesh):
    """The jitted functions of a settled config (layout.settle) on a mesh.

    Returns (init, step, target): init(key) -> TrainState; step(state, batch) -> (state, metrics), the state donated;
    target: a TrainState of ShapeDtypeStructs with their shardings.
    """
    args = configs.dit_args(config)
    args["place"] = sharding.Place(mesh, args["num_heads"])
    optimizer = make_optimizer(**config["optimizer"])
    step = make_train_step(dit.abstract(**args)[0], linear_schedule(config["diffusion"]["timesteps"]), optimizer,
                           seed=config["seed"], ema_decay=config["ema_decay"],
                           label_dropout=config["diffusion"]["label_dropout"], num_classes=args["num_classes"])

    def init(key):
        return init_state(key, args, optimizer)

    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_shardings(shapes, mesh)
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    return (jax.jit(init, out_shardings=shardings),
            jax.jit(step, in_shardings=(shardings, sharding.batch_sharding(mesh)),
                    out_shardings=(shardings, sharding.replicated(mesh)), donate_argnums=0),
            target)


def start_from(params, init, target):
    """The TrainState at step 0 of these params. init, target: of make_programs."""
    def rest(key, params):  # the compiler leaves out the parameters' draws, which nothing asks for
        return replace(init(key), params=None, ema=jax.tree.map(jnp.copy, params))

    shardings = jax.tree.map(lambda a: a.sharding, replace(target, params=None))
    return replace(jax.jit(rest, out_shardings=shardings)(jax.random.key(0), params), params=params)


def least_memory(config):
    """{setting: bytes} of a settled config: the training step, the grids, and what is measured."""
    s, e, judged, model = config["sample"], config["eval"], config["judge"]["samples"], config["model"]
    drawn = min(s["classes"], model["num_classes"] or s["classes"]) * s["per_class"]
    at_once = {f"sample.per_class={s['per_class']}": drawn if s["every"] or judged else 0,
               f"eval.batch_size={e['batch_size']}": min(e["num"], e["batch_size"]) if e["every"] else 0}
    return layout.least_memory(model, config["batch_size"], model["remat"], at_once) | {
        f"judge.samples={judged}": judged * 4 * model["input_size"] ** 2 * model["in_channels"],
        f"eval.num={e['num']}": e["num"] * layout.FEATURES if e["every"] else 0}


def grid_labels(config):
    """The labels of a grid, row by row. Where there are no classes it is as large, and all are 0."""
    s, num_classes = config["sample"], config["model"]["num_classes"]
    classes = np.arange(min(s["classes"], num_classes)) if num_classes else np.zeros(s["classes"], int)
    return np.repeat(classes, s["per_class"])


def make_generator(config, mesh, target, **other):
    """A Generator with the settings of config.sample and, by default, a grid's images at a time."""
    s = config["sample"]
    settings = {"steps": s["steps"], "sampler": s["sampler"], "eta": s["eta"], "cfg_scale": s["cfg_scale"],
                "cfg_channels": s["cfg_channels"] or None, "batch_size": len(grid_labels(config))} | other
    return Generator(configs.dit_args(config), mesh, jax.tree.map(lambda a: a.sharding, target.ema),
                     timesteps=config["diffusion"]["timesteps"], seed=config["seed"], **settings)


def check_same_run(config, identity):
    """A check of a checkpoint's meta against this run's: UserError naming the fields."""
    def check(meta):
        changed = configs.differences(meta["config"], config)
        fixed = [f"{field} ({old!r} there, {new!r} here)" for field, old, new in changed if field in configs.FIXED]
        if not fixed and meta["data"] != identity:
            fixed = [f"the data ({meta['data']} there, {identity} here)"]
        if fixed:
            raise UserError(f"the checkpoint is of another run: {', '.join(fixed)}; use that value or another --workdir")
        for field, old, new in changed:
            say(f"changed since the checkpoint: {field} {old!r} -> {new!r}")
    return check


def check_same_on_all(config, identity):
    """UserError where this host was started with another config, or has other data, than the first."""
    theirs, data = hosts.share((config, identity))[0]
    differ = [f"{field} ({old!r} there, {new!r} here)" for field, old, new in configs.differences(theirs, config)
              if field != "data.path"] + [f"the data ({data} there, {identity} here)"] * (data != identity)
    if differ:
        raise UserError(f"not the run of the first host: {', '.join(differ)}")


def draw_grid(generator, decode, ema, config, path):
    """A picture of config.sample.per_class samples of each of the first classes, a row a class. decode: None, or from
    latents to pictures."""
    s, labels = config["sample"], grid_labels(config)
    images = generator(ema, labels, np.arange(len(labels)))
    images = decode(images) if decode else images
    if jax.process_index() == 0:
        write_aside(path, pictures.png(pictures.grid(pictures.to_uint8(images), s["per_class"])))


def check_finite(values, last, config, checkpoints):
    """UserError where of these steps' values, up to step `last`, one is not finite."""
    for step, v in enumerate(values, last - len(values) + 1):
        if all(map(math.isfinite, v.values())):
            continue
        checkpoints.wait()
        saved = max(checkpoints.steps(), default=None)
        raise UserError(
            f"step {step}: the loss is {v['loss']}, the gradient's norm {v['grad_norm']}, the parameters' {v['param_norm']}; "
            + ("no checkpoint was written" if saved is None else
               f"the last good checkpoint is step {saved} in {checkpoints.directory}")
            + f". Lower optimizer.learning_rate ({config['optimizer']['learning_rate']}) or look at the data")


def measure(generator, ema, train, held_out, count, train_seconds, workdir):
    """The closing measurement: samples of every class in turn, seen by a judge fitted on real pictures."""
    import json

    from dit_jax.metrics import judge

    labels = np.arange(count) % generator.num_classes
    # Indices beyond those of the grids: other noise than the pictures one has looked at.
    samples = generator(ema, labels, 1_000_000 + np.arange(count))
    if jax.process_index():
        return
    if not np.isfinite(samples).all():
        raise UserError(f"the samples at the end of {workdir} are not finite: lower sample.cfg_scale, or train on")
    result = judge.report((train.x, train.y), (held_out.x, held_out.y), samples, labels)
    result["train_seconds"] = round(train_seconds, 1)
    write_aside(os.path.join(workdir, "report.json"), (json.dumps(result, indent=2) + "\n").encode())
    say(f"""
The judge, fitted on the {len(train)} real training pictures, recognises {result['judge_accuracy']:.1%} of the \
{len(held_out)} held-out ones.
Of {count} samples it recognises {result['recognised']:.1%} as the class asked for.
Fréchet distance to the held-out pictures, in the judge's features:
  samples        {result['frechet']:8.3f}
  real training  {result['frechet_floor']:8.3f}   (the floor)
  noise          {result['frechet_noise']:8.3f}
Trained for {train_seconds:.0f} s. All this is in {os.path.join(workdir, 'report.json')}""")


def main():
    workdir = flags.FLAGS.workdir
    if workdir is None:
        raise UserError("--workdir is missing: name the run's folder")
    config = configs.resolve(flags.FLAGS.config)
    # On CPU a collective of one step must not wait behind the next step's: two in flight can lock up.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    cli.make_workdir(workdir, files_in=("metrics.jsonl", "loss.png", "report.json"),
                     folders_in=("checkpoints", "damaged", "samples", "tensorboard", "profile"))
    with files.hold(workdir, "workdir"):
        return train(config, workdir, debug_nans=flags.FLAGS.debug_nans, profile=flags.FLAGS.profile)


def train(config, workdir, *, debug_nans, profile):
    """The run of a resolved config in a folder that is held -> exit status."""
    steps, batch_size, model = config["steps"], config["batch_size"], config["model"]
    preemption = hosts.Preemption()
    keep_compiled(os.path.join(workdir, "compiled"))
    if debug_nans and jax.process_count() > 1:
        raise UserError("--debug_nans: the step that failed is run again, operation by operation, which one host alone "
                        "can")

    # Mesh, data, programs.
    try:
        settled = layout.settle(config, jax.devices())
        mesh = sharding.make_mesh(**settled["mesh"])
        if batch_size % sharding.batch_shards(mesh):
            raise ValueError(f"batch_size={batch_size}: the mesh splits it {sharding.batch_shards(mesh)} ways, which "
                             "does not divide it")
        vae = autoencoder.load(config["vae"]["path"]) if config["vae"]["path"] else None
        source, held_out = sources.load(config["data"], size=model["input_size"], channels=model["in_channels"],
                                        num_classes=model["num_classes"], vae=vae)
        if config["data"]["flip"] and not source.can_flip:
            raise ValueError("data.flip: mirrored latents are not the latents of the mirrored picture; give "
                             "images_flipped.npy or set data.flip=False")
        if config["judge"]["samples"] and not held_out:
            raise ValueError(f"judge.samples: data.source={config['data']['source']!r} has no held-out pictures; set "
                             "judge.samples=0")
        check_same_on_all(config, source.identity)
        layout.check_memory(least_memory(settled), jax.devices())
        init, train_step, target = make_programs(settled, mesh)
        across = sharding.batch_sharding(mesh)
        model_input = pipeline.model_input(mesh, across, seed=config["seed"], scale=getattr(source, "scale", None),
                                           vae=vae if config["data"]["source"] in ("folder", "tfds") else None)
        generator = evaluate = None
        decode = vae and vae.decoder(mesh, model["input_size"] * vae.factor)
        if config["sample"]["every"] or config["judge"]["samples"]:
            try:
                generator = make_generator(settled, mesh, target)
            except ValueError as e:
                raise ValueError(f"config.sample: {e}") from None
        if config["eval"]["every"]:
            from dit_jax.metrics.during import Evaluator
            e, size = config["eval"], model["input_size"] * (vae.factor if vae else 1)
            try:
                if not vae and not pictures.is_picture(model["in_channels"]):
                    raise ValueError(f"every={e['every']}: latents are no pictures: name a decoder with vae.path")
                evaluate = Evaluator(
                    mesh, make_generator(settled, mesh, target, cfg_scale=e["cfg_scale"],
                                         batch_size=min(e["num"], e["batch_size"])),
                    decode, size, e["num"], e["features"], e["inception"], e["reference"])
            except ValueError as error:
                raise ValueError(f"config.eval: {error}") from None
    except ValueError as e:
        raise UserError(str(e)) from None
    args = configs.dit_args(settled)
    peak, peak_source = flops.peak_flops(args["dtype"])
    params, _ = flops.num_params(**args)
    say(f"{model['name'] or 'DiT'}: {params:,d} parameters, {flops.macs(**args) / 1e9:.3g} G multiply-adds an image, "
        f"{args['dtype'].name}; {len(source):,d} examples of {source.identity}; {len(jax.devices())} "
        f"{jax.devices()[0].device_kind} device(s), mesh {dict(mesh.shape)}; peak {peak / 1e12:.3g} TFLOP/s a device "
        f"({peak_source})")

    # State: the newest checkpoint's, or a new one.
    checkpoints = Checkpoints(workdir, config["checkpoint"]["keep"], config["checkpoint"]["keep_every"])
    restored = checkpoints.restore_latest(target, check_same_run(config, source.identity))
    state, meta = restored or (None, {"train_seconds": 0.0})
    if not restored and config["init"]["weights"]:
        params, meta["init"] = finetune.initial_params(**config["init"], args=args, mesh=mesh, seed=config["seed"])
        state = start_from(params, init, target)
    elif not restored:
        state = init(jax.random.key(config["seed"]))
    first, trained_before = int(state.step), meta["train_seconds"]
    if first > steps:
        raise UserError(f"steps={steps}: the checkpoint in {workdir} is at step {first} already")
    if restored:
        say(f"goes on from step {first} of {steps}")
    trace = Trace(profile, os.path.join(workdir, "profile"), first + 1, steps)
    metrics = Metrics(workdir, first)

    def save(step):
        checkpoints.save(step, state, {"config": config, "data": source.identity, "init": meta.get("init"),
                                       "train_seconds": seconds(), "unlogged": unlogged,
                                       "versions": {"jax": jax.__version__}})

    def interrupted():
        step = checkpoints.settle(seconds=5)
        hosts.stop(1, f"interrupted; the same command goes on from step {step}")

    def evaluate_if_due(step):
        """Whether it was. What a run was stopped before, between a checkpoint and this, the next one makes up for."""
        every = config["eval"]["every"]
        if not every or not step or (step % every and step < steps):
            return False
        if hosts.share(any(r["step"] == step and "loss" not in r for r in metrics.records))[0]:
            return False
        values, line = evaluate(state.ema)
        if values:
            metrics.write(step, values)
        progress.say(f"step {step}/{steps}  {line}")
        return True

    def draw_curve():
        if metrics.main:
            pictures.loss_curve(metrics.records, os.path.join(workdir, "loss.png"))

    def seconds():
        return trained_before + time.perf_counter() - start

    # The loop. Metrics stay on the device until they are logged; nothing is saved that was not seen to be finite.
    start = mark = time.perf_counter()
    mark_step, pending = first, []
    unlogged = meta.get("unlogged", [])  # values of the steps since the last record: a stop does not cut their mean
    ending.on_signal(signal.SIGINT, interrupted)
    preemption.running = True
    progress = Progress("train", steps, "steps", done=first)
    batches = pipeline.Batches(source, seed=config["seed"], flip=config["data"]["flip"], first_step=first,
                               last_step=steps, batch_size=batch_size, sharding=across, num_classes=model["num_classes"])
    if evaluate_if_due(first):
        draw_curve()
        mark = time.perf_counter()
    stop = False
    for step in range(first + 1, steps + 1):
        try:
            batch = batches.get(running=pending[-1:])
        except ValueError as e:
            raise UserError(str(e)) from None
        with trace.step(step), jax.debug_nans(debug_nans):
            state, values = train_step(state, model_input(batch, step - 1))
        trace.after(step, values)
        pending.append(values)
        stop, last = preemption.reached(step), step == steps
        log, keep = step % config["log_every"] == 0 or last, step % config["checkpoint"]["every"] == 0 or last or stop
        picture = config["sample"]["every"] and (step % config["sample"]["every"] == 0 or last)

        if log or keep:
            values = jax.device_get(pending)
            unlogged += [{name: float(x) for name, x in v.items()} for v in values]
            pending = []
            check_finite(unlogged[-len(values):], step, config, checkpoints)
            checkpoints.check()
        if log:
            now = time.perf_counter()
            rate = (step - mark_step) / (now - mark)
            record = {name: float(np.mean([v[name] for v in unlogged if name in v])) for name in unlogged[-1]}
            record |= {"steps_per_second": rate, "images_per_second": rate * batch_size,
                       "data_wait": batches.waited / (now - mark),
                       "mfu": rate * batch_size * flops.train_flops(**args) / (peak * len(jax.devices()))}
            metrics.write(step, record)
            mark, mark_step, batches.waited, unlogged = now, step, 0.0, []
            progress.update(step, f"loss {record['loss']:.4f}, {record['images_per_second']:.0f} img/s, "
                                  f"MFU {record['mfu']:.0%}")
            progress.say(f"step {step}/{steps}  loss {record['loss']:.4f}  mse {record['mse']:.4f}  vb "
                         f"{record['vb']:.4f}  {rate:.3g} steps/s  {record['images_per_second']:.4g} images/s  "
                         f"MFU {record['mfu']:.0%}  {duration((steps - step) / rate)} left"
                         + (f"  waited for data {record['data_wait']:.0%}" if record["data_wait"] > 0.05 else ""))
        else:
            progress.update(step)
        if keep:
            save(step)
        if picture:
            draw_grid(generator, decode, state.ema, config, os.path.join(workdir, "samples", f"{step:08d}.png"))
        measured = not stop and evaluate_if_due(step)
        if keep or picture or measured:
            draw_curve()
            mark, mark_step, batches.waited = time.perf_counter(), step, 0.0
        if stop:
            break
    progress.close()
    trace.close()
    batches.close()
    checkpoints.close()
    preemption.running = False
    if stop:
        say(f"preempted: step {step} of {steps} is saved in {workdir}, and the same command goes on from there")
        return hosts.AGAIN
    train_seconds = seconds() if first < steps else trained_before
    say(f"done: step {steps}. All of the run is in {workdir}")
    if config["judge"]["samples"]:
        measure(generator, state.ema, source, held_out, config["judge"]["samples"], train_seconds, workdir)


if __name__ == "__main__":
    cli.run(main)
