"""A run's program compiled ahead of time for a TPU slice, and what it takes: memory, arithmetic, bytes, bounds."""

import re
import time
from importlib.metadata import version

import jax
import numpy as np

from dit_jax import config as configs
from dit_jax.aot.hlo import Program
from dit_jax.aot.slices import SLICES, find_devices
from dit_jax.diffusion.process import linear_schedule, respace
from dit_jax.models import flops
from dit_jax.parallel import layout, sharding
from dit_jax.parallel.chips import CHIPS
from dit_jax.runtime.errors import UserError
from dit_jax.training import setup
from dit_jax.vae import autoencoder, network


def _program(config, mesh, what):
    """(the jitted function, the shapes it is called with, how many images one call takes or makes)."""
    if what in ("encode", "decode"):
        return _vae_program(config["model"], mesh, what)
    model, batch = config["model"], config["batch_size"]
    init, step, target = setup.make_programs(config, mesh)
    across = sharding.batch_sharding(mesh)
    if what == "train":
        size = (batch, model["input_size"], model["input_size"], model["in_channels"])
        return step, (target, {"x": jax.ShapeDtypeStruct(size, np.float32, sharding=across),
                               "y": jax.ShapeDtypeStruct((batch,), np.int32, sharding=across)}), batch
    generator = setup.make_generator(config, mesh, target)
    n = generator.batch_size
    return generator.run, (target.ema, jax.ShapeDtypeStruct((n,), np.int32, sharding=across),
                           jax.ShapeDtypeStruct((n,), np.uint32, sharding=across)), n


def _vae_program(model, mesh, what):
    """_program of the published VAE at the size that the model's latents stand for."""
    codec = autoencoder.Autoencoder(network.PUBLISHED, network.abstract(**network.PUBLISHED)[1])
    if model["in_channels"] != codec.latent_channels:
        raise UserError(f"model.in_channels={model['in_channels']}: --what={what} is about latents, of "
                        f"{codec.latent_channels} channels")
    side, size = model["input_size"], model["input_size"] * codec.factor
    function, names, shape, dtype = (
        (codec.posteriors, autoencoder.ENCODING, (size, size, 3), np.uint8) if what == "encode" else
        (codec.decode, autoencoder.DECODING, (side, side, codec.latent_channels), np.float32))
    batch = mesh.size * autoencoder.batch_size(size)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    whole = sharding.replicated(mesh)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), codec.only(names))
    return (sharding.over_devices(function, mesh),
            (params, jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=spread)), batch)


def _bytes(text):
    number, unit = re.match(r"([\d.]+)([KMGT]?)", text).groups()
    return float(number) * 1024 ** " KMGT".index(unit or " ")


def _bytes_a_device(tree):
    return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def advice(config, devices, capacity, needed):
    """What would make training fit, by the estimate of layout.memory, scaled up to what this run `needed`: [text]."""
    found, n = [], len(devices)
    model, mesh, batch = config["model"], config["mesh"], config["batch_size"]

    def estimate(remat=model["remat"], batch_size=batch, **sizes):
        return layout.memory(config | {"batch_size": batch_size, "mesh": mesh | sizes}, n, remat)

    scale = max(1, (needed or 0) / estimate())

    def fits(**changes):
        return scale * estimate(**changes) < 0.9 * capacity

    fsdp = n // mesh["tensor"]
    whole = f"--config.mesh.data=1 --config.mesh.fsdp={fsdp} --config.mesh.tensor={mesh['tensor']}"
    if mesh["fsdp"] < fsdp and fits(fsdp=fsdp):
        found.append(whole)
    policies = ("none", "dots", "full")
    for remat in policies[policies.index(model["remat"]) + 1:]:
        if fits(remat=remat):
            found.append(f"--config.model.remat={remat}")
            break
    both = dict(remat="full", fsdp=fsdp)
    smaller = batch
    while smaller > n // mesh["tensor"] and not fits(batch_size=smaller, **both):
        smaller //= 2
    if not found and fits(batch_size=smaller, **both):
        found.append(f"--config.model.remat=full {whole}"
                     + (f" --config.batch_size={smaller}" if smaller < batch else ""))
    return found or ["a larger slice: nothing that this command knows of is enough"]


def examine(config, topology, what="train"):
    """The report of a resolved config on a slice, as a dict of plain values. Raises UserError."""
    devices = find_devices(topology)
    chip = CHIPS[devices[0].device_kind]
    config = layout.resolve_auto(config, devices)
    mesh = sharding.make_mesh(**config["mesh"], devices=devices)
    if config["batch_size"] % sharding.batch_shards(mesh) and what == "train":
        raise UserError(f"batch_size={config['batch_size']}: the mesh splits it {sharding.batch_shards(mesh)} ways, "
                        "which does not divide it")
    args, n = configs.dit_args(config), len(devices)
    report = {
        "what": what, "model": config["model"]["name"], "topology": SLICES.get(topology, topology), "chip": chip.name,
        "chips": n // chip.devices, "devices": n, "mesh": dict(mesh.shape),
        "scan": config["model"]["scan"], "remat": config["model"]["remat"], "dtype": config["model"]["dtype"],
        "hbm_capacity_bytes": int(chip.hbm),
        "versions": {"jax": jax.__version__, "libtpu": version("libtpu")},
        "peak_figures": {"flops_per_s": chip.flops / chip.devices, "hbm_bytes_per_s": chip.bandwidth / chip.devices,
                         "interconnect_bytes_per_s_into_a_chip": chip.interconnect, "source": chip.source},
    }
    if what in ("encode", "decode"):
        report |= {"model": "AutoencoderKL", "scan": None, "remat": None, "dtype": "float32"}
    start = time.perf_counter()
    function, shapes, images = _program(config, mesh, what)
    lowered = function.lower(*shapes)
    middle = time.perf_counter()
    report |= {"images_per_step": images, "lower_seconds": round(middle - start, 1)}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        total = re.search(r"Used ([\d.]+[KMGT]?) of", str(e))
        temporary = re.search(r"\(([\d.]+[KMGT]?)\) exceeds", str(e))
        needed = (_bytes(total[1]) if total else
                  _bytes(temporary[1]) + _bytes_a_device(shapes) if temporary else None)
        report |= {"fits": False, "hbm_peak_bytes": needed and int(needed),
                   "compile_seconds": round(time.perf_counter() - middle, 1), "compiler_says": str(e).splitlines()[0]}
    else:
        report["compile_seconds"] = round(time.perf_counter() - middle, 1)
        _read(report, compiled, mesh, chip, config, args)
    if not report["fits"] and what == "train":
        report["advice"] = advice(config, devices, chip.hbm, report["hbm_peak_bytes"])
    return report


def _read(report, compiled, mesh, chip, config, args):
    """Memory, arithmetic, bytes, collectives and the bounds, read off the compiled program."""
    # v2 and v3 show two devices a chip; coords are the chip's.
    places = [tuple(d.coords) for d in mesh.devices.flat]
    number = {place: i for i, place in enumerate(dict.fromkeys(places))}
    cost = Program(compiled.as_text(), [number[place] for place in places]).cost()
    memory, xla = compiled.memory_analysis(), compiled.cost_analysis()
    per_image = {"train": lambda: flops.train_flops(**args), "sample": lambda: (
        2 * flops.macs(**args) * (2 if config["sample"]["cfg_scale"] != 1 else 1) * _denoising_steps(config))}
    images = report["images_per_step"]
    own = per_image[report["what"]]() * images / mesh.size if report["what"] in per_image else None
    rates = report["peak_figures"]
    # A float32 product at the highest precision, as the VAE asks for, is six of bfloat16.
    passes = 6 if report["what"] in ("encode", "decode") else 1
    bounds = {"arithmetic": passes * cost.matrix_flops / rates["flops_per_s"],
              "memory": cost.hbm_bytes / rates["hbm_bytes_per_s"],
              "interconnect": cost.chip_bytes / rates["interconnect_bytes_per_s_into_a_chip"]}
    bound = max(bounds.values())
    estimate = xla.get("optimal_seconds", 0.0)
    report |= {
        "fits": memory.peak_memory_in_bytes <= chip.hbm,
        "hbm_peak_bytes": memory.peak_memory_in_bytes,
        "hbm_arguments_bytes": memory.argument_size_in_bytes, "hbm_outputs_bytes": memory.output_size_in_bytes,
        "hbm_aliased_bytes": memory.alias_size_in_bytes, "hbm_temporaries_bytes": memory.temp_size_in_bytes,
        "hbm_program_bytes": memory.generated_code_size_in_bytes,
        "bfloat16_passes": passes, "flops_per_device": cost.flops, "matrix_flops_per_device": cost.matrix_flops,
        "model_flops_per_device": own,  # None: not counted, of the VAE
        "xla_flops_per_device": xla["flops"], "bytes_per_device": cost.bytes, "hbm_bytes_per_device": cost.hbm_bytes,
        "xla_bytes_per_device": xla["bytes accessed"],
        "collectives": {kind: {"count": int(count), "bytes": int(size)} for kind, (count, size)
                        in sorted(cost.collectives.items())},
        "interconnect_bytes_into_a_chip": cost.chip_bytes,
        "bounds_s": bounds, "step_time_bound_s": bound, "bound_by": max(bounds, key=bounds.get),
        "images_per_s_bound": images / bound,
        # XLA counts an op that it does not know as -1 s, and the body of a loop once; only on v3 is the rest plausible.
        "xla_estimate_s": (estimate - np.floor(estimate) if report["chip"] == "v3" and report["what"] == "train"
                           and not report["scan"] else None),
    }
    if report["what"] == "train":
        report |= {"days_to_400k_steps_bound": 400_000 * bound / 86400, "days_to_7m_steps_bound": 7e6 * bound / 86400}


def _denoising_steps(config):
    return len(respace(linear_schedule(config["diffusion"]["timesteps"]), config["sample"]["steps"]))
