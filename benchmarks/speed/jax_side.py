"""The child that times dit_jax: the programs that `train` and `sample` run."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.speed import profile
from benchmarks.speed.child import Timed, peak_memory, serve
from dit_jax import cli, config as configs
from dit_jax.diffusion.guidance import guide
from dit_jax.diffusion.objectives import DDPM
from dit_jax.models import dit, flops
from dit_jax.parallel import chips, layout, sharding
from dit_jax.runtime import process
from dit_jax.runtime.errors import UserError
from dit_jax.sampling.generator import Generator, Settings, make_sampler
from dit_jax.training.setup import make_programs
from dit_jax.vae import files as vae_files, network
from dit_jax.vae.autoencoder import DECODING, Autoencoder, batch_size


def device_memory():
    """Returns the most bytes that one device has held; on CPU, the process."""
    return chips.peak_memory() or peak_memory()


def timed(call, compiled_in, dtype, flop, images, program=None, devices=None):
    """Returns the Timed of a call.

    flop: floating-point operations of a call, over all `devices`. program: the compiled one that a call runs, where it
    is to be profiled, which works on a CPU.
    """
    dtype = jnp.dtype(dtype)
    devices, rate = jax.devices() if devices is None else devices, chips.data_sheet_flops()
    info = {
        "compile": compiled_in,
        "flop": flop,
        "images": images,
        "dtype": dtype.name,
        "devices": len(devices),
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "data_sheet": rate * len(devices) if rate and dtype == jnp.bfloat16 else None,
    }

    def profiled():
        if program is not None and devices[0].platform == "cpu":
            return profile.profile(program.as_text(), call)

    return Timed(
        call, info, rate=lambda: chips.measured_flops(dtype) * len(devices), memory=device_memory, profile=profiled
    )


def compiled(function, *shapes):
    """Compiles a jitted function. Returns (the program, how many seconds that took)."""
    start = time.perf_counter()
    program = function.lower(*shapes).compile()
    return program, time.perf_counter() - start


def _setting(config, what="batch_size"):
    """Returns (the config with every "auto" decided, its mesh). what: the flag or field that says its batch size."""
    config = layout.resolve_auto(config, jax.devices())
    mesh = sharding.make_mesh(**config["mesh"])
    if config["batch_size"] % sharding.batch_shards(mesh):
        raise UserError(
            f"{what}={config['batch_size']}: the mesh splits it {sharding.batch_shards(mesh)} ways, which "
            "does not divide it"
        )
    return config, mesh


def train_step(config):
    """Times the step of training.setup.make_programs, on one batch of noise that lies on the devices."""
    config, mesh = _setting(config)
    init, step, target = make_programs(config, mesh)
    args, n = configs.dit_args(config), config["batch_size"]
    rng = np.random.default_rng(0)
    shape = (n, args["input_size"], args["input_size"], args["in_channels"])
    batch = jax.device_put(
        {
            "x": rng.standard_normal(shape, np.float32),
            "y": rng.integers(max(args["num_classes"], 1), size=n, dtype=np.int32),
        },
        sharding.batch_sharding(mesh),
    )
    program, seconds = compiled(step, target, batch)
    state = init(jax.random.key(config["seed"]))

    def call():
        nonlocal state
        state, values = program(state, batch)
        return {"value": float(jax.block_until_ready((state, values))[1]["loss"])}

    return timed(call, seconds, args["dtype"], n * flops.train_flops(**args), n, program)


def _sampling(config, images):
    """Returns (config, arguments of DiT, mesh, weights, their shardings, labels of `images`)."""
    config, mesh = _setting(config | {"batch_size": images}, "--images")
    args = configs.dit_args(config)
    # As the sampler has them where they fit: the same numbers, float32 on a CPU.
    shapes = jax.eval_shape(partial(dit.cast_kernels, dtype=args["dtype"]), dit.abstract(**args)[1])
    shardings = sharding.state_shardings(shapes, mesh)
    # Any numbers, made in their place: random ones would take memory beside the weights, and peak memory is measured.
    params = jax.tree.map(
        lambda a, where: jax.jit(
            lambda: 0.02 * jnp.sin(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), out_shardings=where
        )(),
        shapes,
        shardings,
    )
    return config, args, mesh, params, shardings, np.arange(images, dtype=np.int32) % args["num_classes"]


def denoise(config, images, steps=1):
    """Times guided denoising steps: the network on a doubled batch, guidance, the sampler's update with given noise.

    steps: how many of the sampler's steps a call makes, one after the other. Each runs one compiled program.
    """
    config, args, mesh, params, _, labels = _sampling(config, images)
    s, batch = config["sample"], sharding.batch_sharding(mesh)
    graphdef = dit.abstract(**args | {"sharding": sharding.MeshSharding(mesh, args["num_heads"])})[0]
    sampler = make_sampler(
        Settings(sampler=s["sampler"], steps=s["steps"], eta=s["eta"]), DDPM(config["diffusion"]["timesteps"])
    )

    def step(params, x, noise, labels, i):
        network = nnx.merge(graphdef, params)
        guided = guide(network, labels, args["num_classes"], s["cfg_scale"], s["cfg_channels"])
        return sampler.step(lambda x, t, h, i: guided(x, t), (x,), i, lambda _: noise)[0]

    x, noise = (
        jax.device_put(a, batch)
        for a in np.random.default_rng(0).standard_normal(
            (2, images, args["input_size"], args["input_size"], args["in_channels"]), np.float32
        )
    )
    labels = jax.device_put(labels, batch)
    program, seconds = compiled(jax.jit(step, out_shardings=batch), params, x, noise, labels, jnp.int32(0))
    order = [jnp.int32(i) for i in range(steps)]

    def call():
        x_t = x
        for i in order:
            x_t = program(params, x_t, noise, labels, i)
        jax.block_until_ready(x_t)

    return timed(call, seconds, args["dtype"], steps * images * 4 * flops.macs(**args), images, program)


def sampler(config, images):
    """Times a whole sampling run by sampling.generator.Generator, step after step as `sample` runs it."""
    config, args, mesh, params, shardings, labels = _sampling(config, images)
    s = config["sample"]
    settings = Settings(config["seed"], s["sampler"], s["steps"], s["eta"], s["cfg_scale"], s["cfg_channels"])
    generator = Generator(
        args,
        mesh,
        shardings,
        objective=DDPM(config["diffusion"]["timesteps"]),
        settings=settings,
        batch_size=images,
        on_step=lambda step: None,
    )
    indices = np.arange(images)
    start = generator.start(generator.request(labels, indices))
    program, seconds = compiled(generator.step, params, generator.abstract_request(), start, np.int32(0))
    generator.step = program  # pyright: ignore[reportAttributeAccessIssue]
    generator.result(start).block_until_ready()  # compiles this one as well, before a call is timed
    return timed(
        lambda: {"value": float(np.abs(generator(params, labels, indices)).mean())},
        seconds,
        args["dtype"],
        len(generator.sampler) * images * 4 * flops.macs(**args),
        images,
    )


def decode(side, path):
    """Times the decoding of as many latents as the VAE takes at once, on one device.

    side: of a latent. path: of a VAE. Where it is empty, the VAE is of the published shape, and its weights are noise.
    """
    devices = jax.devices()[:1]
    mesh = sharding.make_mesh(devices=devices)
    if path:
        vae = vae_files.load(path)
    else:
        rng = np.random.default_rng(0)
        vae = Autoencoder(
            network.PUBLISHED,
            jax.tree.map(
                lambda a: rng.normal(0, 0.02, a.shape).astype(np.float32), network.abstract(**network.PUBLISHED)[1]
            ),
        )
    params = jax.device_put(vae.only(DECODING), sharding.replicated(mesh))
    images = batch_size(side * vae.factor)
    latents = np.random.default_rng(0).standard_normal((images, side, side, vae.latent_channels), np.float32)
    program, seconds = compiled(sharding.over_devices(vae.decode, mesh), params, latents)

    def call():
        jax.block_until_ready(program(params, latents))

    return timed(call, seconds, "float32", program.cost_analysis()["flops"], images, program, devices)


def make(spec):
    """Returns a Timed. spec: what, the name of one of the functions above, and its arguments."""
    process.no_compilation_cache()
    process.one_step_at_a_time()  # as in train and sample
    what = {"train": train_step, "denoise": denoise, "sampler": sampler, "decode": decode}[spec.pop("what")]
    return what(**spec)


if __name__ == "__main__":
    cli.parse()
    cli.run(lambda: serve(make))
