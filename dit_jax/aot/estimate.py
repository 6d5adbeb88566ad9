"""Compiles a run ahead of time for a TPU slice and returns what it takes: memory, arithmetic, bytes, time bounds."""

import re
import time
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from dit_jax import config as configs
from dit_jax.aot.cost import Program
from dit_jax.aot.slices import SLICES, find_devices
from dit_jax.models import flops
from dit_jax.parallel import layout, sharding
from dit_jax.parallel.chips import CHIPS
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import waiting
from dit_jax.training import setup
from dit_jax.vae import autoencoder, network


def _program(config, mesh, what, batch_size):
    """Returns the jitted function, the shapes of its arguments, the number of images per call, and its mesh.

    batch_size: of the sampler; None for the images of a grid.
    """
    if what in ("encode", "decode"):
        return *_vae_program(config["model"], mesh, what), mesh
    _, step, target = setup.make_programs(config, mesh)
    if what == "sample":
        generator = setup.make_generator(config, mesh, target, batch_size=batch_size)
        weights = generator.abstract_weights(target.ema)
        return generator.run, (weights, generator.abstract_request()), generator.batch_size, generator.mesh
    model, n = config["model"], config["batch_size"]
    split = sharding.batch_sharding(mesh)
    shape = (n, model["input_size"], model["input_size"], model["in_channels"])
    batch = {
        "x": jax.ShapeDtypeStruct(shape, np.float32, sharding=split),
        "y": jax.ShapeDtypeStruct((n,), np.int32, sharding=split),
    }
    return step, (target, batch), n, mesh


def _vae_program(model, mesh, what):
    """As the first three of _program, of the published VAE at the picture size of the model's latents."""
    vae = autoencoder.Autoencoder(network.PUBLISHED, network.abstract(**network.PUBLISHED)[1])
    if model["in_channels"] != vae.latent_channels:
        raise UserError(
            f"model.in_channels={model['in_channels']}: --what={what} is about latents, of "
            f"{vae.latent_channels} channels"
        )
    side, size = model["input_size"], model["input_size"] * vae.factor
    if what == "encode":
        function, names, shape, dtype = vae.posteriors, autoencoder.ENCODING, (size, size, 3), np.uint8
    else:
        function, names, shape, dtype = vae.decode, autoencoder.DECODING, (side, side, model["in_channels"]), np.float32
    n = mesh.size * autoencoder.batch_size(size)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    whole = sharding.replicated(mesh)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), vae.only(names))
    images = jax.ShapeDtypeStruct((n, *shape), dtype, sharding=split)
    return sharding.over_devices(function, mesh), (params, images), n


def _advice(config, n, capacity, needed):
    """Returns the flags that would make training fit on n devices.

    capacity: bytes of memory per device. needed: bytes that the run as configured takes, or None if unknown. The
    estimate of layout.training_memory is scaled up to it.
    """
    found = []
    model, mesh, batch = config["model"], config["mesh"], config["batch_size"]

    def estimate(remat=model["remat"], batch_size=batch, parts=config["accumulate"], **sizes):
        return layout.training_memory(config | {"batch_size": batch_size, "mesh": mesh | sizes}, n, remat, parts)

    scale = max(1, (needed or 0) / estimate())

    def fits(**changes):
        return scale * estimate(**changes) < 0.9 * capacity

    fsdp = n // mesh["tensor"]
    most_fsdp = f"--config.mesh.data=1 --config.mesh.fsdp={fsdp} --config.mesh.tensor={mesh['tensor']}"
    if mesh["fsdp"] < fsdp and fits(fsdp=fsdp):
        found.append(most_fsdp)
    policies = ("none", "dots", "full")
    for remat in policies[policies.index(model["remat"]) + 1 :]:
        if fits(remat=remat):
            found.append(f"--config.model.remat={remat}")
            break
    share = batch * mesh["tensor"] // n
    for parts in (p for p in range(config["accumulate"] + 1, share + 1) if share % p == 0):
        if remat := next((r for r in policies[policies.index(model["remat"]) :] if fits(parts=parts, remat=r)), None):
            remat_flag = f" --config.model.remat={remat}" if remat != model["remat"] else ""
            found.append(f"--config.accumulate={parts}{remat_flag}")
            break
    both = dict(remat="full", fsdp=fsdp, parts=share)
    if not found and fits(**both):
        found.append(f"--config.model.remat=full {most_fsdp} --config.accumulate={share}")
    return found or ["a larger slice: nothing that this command knows of is enough"]


def estimate_run(
    config: dict[str, Any], topology: str, what: str = "train", per_device: int | None = None
) -> dict[str, Any]:
    """Compiles a resolved config for a slice and returns the report, a dict of plain values.

    what: "train", "sample", "encode" or "decode". per_device: for "sample", how many images are sampled at once on each
    device; None for as many as the run's grids have in all. Raises UserError if the slice is unknown or does not suit
    the config.
    """
    devices = find_devices(topology)
    chip = CHIPS[devices[0].device_kind]
    config = layout.resolve_auto(config, devices)
    mesh = sharding.make_mesh(**config["mesh"], devices=devices)
    if what == "train":
        setup.check_batch(config, mesh)
    start = time.perf_counter()
    function, shapes, images, mesh = _program(config, mesh, what, per_device and per_device * len(devices))
    report = _describe(config, topology, mesh, chip, what)
    report["images_per_step"] = images
    with waiting(f"compiling: {report['model'] or 'DiT'}, {what}, on {topology}"):
        report |= _compiled(function, shapes, start, config, mesh, chip, report)
    if not report["fits"] and what == "train":
        report["advice"] = _advice(config, mesh.size, chip.hbm, report["hbm_peak_bytes"])
    return report


def _compiled(function, shapes, start, config, mesh, chip, report):
    """Compiles the program, and returns the part of the report that says what it takes. start: when tracing began."""
    lowered = function.lower(*shapes)
    lowered_at = time.perf_counter()
    times: dict[str, Any] = {"lower_seconds": round(lowered_at - start, 1)}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        needed = _bytes_needed(str(e))
        return times | {
            "fits": False,
            "hbm_peak_bytes": needed and int(needed),
            "compile_seconds": round(time.perf_counter() - lowered_at, 1),
            "compiler_says": str(e).splitlines()[0],
        }
    times["compile_seconds"] = round(time.perf_counter() - lowered_at, 1)
    return times | _costs(compiled, config, mesh, chip, report)


def _describe(config, topology, mesh, chip, what):
    """Returns the part of the report that is known before the program is compiled."""
    model = config["model"]
    if what in ("encode", "decode"):
        model = {"name": "AutoencoderKL", "scan": None, "remat": None, "attention": "xla", "dtype": "float32"}
    return {
        "what": what,
        "model": model["name"],
        "topology": SLICES.get(topology, topology),
        "chip": chip.name,
        "chips": mesh.size // chip.devices,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "scan": model["scan"],
        "remat": model["remat"],
        "accumulate": config["accumulate"] if what == "train" else 1,
        "attention": model["attention"],
        "dtype": model["dtype"],
        "hbm_capacity_bytes": int(chip.hbm),
        "versions": {"jax": jax.__version__, "libtpu": version("libtpu")},
        "peak_figures": {
            "flops_per_s": chip.flops / chip.devices,
            "hbm_bytes_per_s": chip.bandwidth / chip.devices,
            "interconnect_bytes_per_s_into_a_chip": chip.interconnect,
            "source": chip.source,
        },
    }


def _bytes_needed(error):
    """Returns the bytes per device that the compiler's error names, or None.

    It calls them temporaries, but the arguments are among them: they are the peak of the same program where it fits.
    """
    total = re.search(r"Used ([\d.]+)([KMGT]?) of", error) or re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", error)
    return total and float(total[1]) * 1024 ** " KMGT".index(total[2] or " ")


def _chip_numbers(mesh):
    """Returns the number of each device's chip. v2 and v3 show two devices per chip; coords are the chip's."""
    coords = [tuple(device.coords) for device in mesh.devices.flat]
    number = {chip: i for i, chip in enumerate(dict.fromkeys(coords))}
    return [number[chip] for chip in coords]


def _model_flops(config, what):
    """Returns the model's own FLOPs per image, or None for the VAE, which is not counted."""
    args: dict[str, Any] = configs.dit_args(config)
    if what == "train":
        return flops.train_flops(configs.objective_of(config).train_passes, **args)
    if what == "sample":
        return 2 * flops.macs(**args) * setup.network_passes(config)
    return None


def _costs(compiled, config, mesh, chip, report):
    """Returns memory, arithmetic, bytes, collectives and bounds of the compiled program."""
    memory, xla = compiled.memory_analysis(), compiled.cost_analysis()
    costs = {
        "fits": memory.peak_memory_in_bytes <= chip.hbm,
        "hbm_peak_bytes": memory.peak_memory_in_bytes,
        "hbm_arguments_bytes": memory.argument_size_in_bytes,
        "hbm_outputs_bytes": memory.output_size_in_bytes,
        "hbm_aliased_bytes": memory.alias_size_in_bytes,
        "hbm_temporaries_bytes": memory.temp_size_in_bytes,
        "hbm_program_bytes": memory.generated_code_size_in_bytes,
        "xla_flops_per_device": xla["flops"],
        "xla_bytes_per_device": xla["bytes accessed"],
    }
    try:
        cost = Program(compiled.as_text(), _chip_numbers(mesh)).cost()
    except ValueError as e:
        return costs | {"not_understood": str(e)}
    what, images = report["what"], report["images_per_step"]
    kinds = {kind: int(moved) for kind, moved in cost.hbm_kinds.items() if moved}
    model_flops = _model_flops(config, what)
    # XLA counts an unknown operation as -1 s, and the body of a loop once. The fraction is plausible only on v3.
    xla_seconds = None
    if chip.name == "v3" and what == "train" and not report["scan"] and report["accumulate"] == 1:
        seconds = xla.get("optimal_seconds", 0.0)
        xla_seconds = seconds - np.floor(seconds)
    costs |= {
        "flops_per_device": cost.flops,
        "matrix_flops_per_device": cost.matrix_flops,
        "model_flops_per_device": None if model_flops is None else model_flops * images / mesh.size,
        "bytes_per_device": cost.bytes,
        "hbm_bytes_per_device": cost.hbm_bytes,
        "hbm_bytes_by_kind": {kind: kinds[kind] for kind in sorted(kinds, key=kinds.__getitem__, reverse=True)},
        "collectives": {
            kind: {"count": int(count), "bytes": int(size)} for kind, (count, size) in sorted(cost.collectives.items())
        },
        "interconnect_bytes_into_a_chip": cost.chip_bytes,
        "xla_estimate_s": xla_seconds,
    }
    return costs | _bounds(cost, what, images, report["peak_figures"])


def _bounds(cost, what, images, rates):
    """Returns the lower bounds of the time that one call takes."""
    # A float32 product at the highest precision, which the VAE asks for, takes six bfloat16 products.
    passes = 6 if what in ("encode", "decode") else 1
    bounds = {
        "arithmetic": passes * cost.matrix_flops / rates["flops_per_s"],
        "memory": cost.hbm_bytes / rates["hbm_bytes_per_s"],
        "interconnect": cost.chip_bytes / rates["interconnect_bytes_per_s_into_a_chip"],
    }
    bound_by = max(bounds, key=lambda name: bounds[name])
    bound = bounds[bound_by]
    days = {f"days_to_{name}_steps_bound": n * bound / 86400 for name, n in (("400k", 400_000), ("7m", 7_000_000))}
    return {
        "bfloat16_passes": passes,
        "bounds_s": bounds,
        "step_time_bound_s": bound,
        "bound_by": bound_by,
        "images_per_s_bound": images / bound,
    } | (days if what == "train" else {})
