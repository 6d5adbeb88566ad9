"""Compiles a run for a TPU slice that is not there: python -m dit_jax.preflight

    python -m dit_jax.preflight --config=configs/xl2.py --topology=v3:8x16
    python -m dit_jax.preflight --config=configs/xl2.py --topology=v5e-16 --what=sample --out=report.json
    python -m dit_jax.preflight --config=configs/xl2_512.py --topology=v3-8 --what=decode
    python -m dit_jax.preflight --table=v3-8,v3-256 --models=DiT-XL/2,DiT-XL/2-512

The program is the very one that `train` (or the sampler, or the VAE) runs, compiled ahead of time by libtpu's compiler.
Whether it fits is the compiler's word. The times are bounds from the chip's peak figures, not timings: a real step takes
longer. Exit status 1 where it does not fit.
"""

from dit_jax import cli

from absl import flags

if __name__ == "__main__":
    cli.define_config(required=False)
    flags.DEFINE_string("topology", None, "the slice: v3:8x16 or v3-256")
    flags.DEFINE_enum("what", "train", ["train", "sample", "encode", "decode"],
                      "the training step, the sampler with config.sample, or the published VAE at the size of the model")
    cli.define_path("out", None, "a JSON file for the report")
    flags.DEFINE_list("table", None, "instead: a table in Markdown of these slices, or all, with the paper's models")
    flags.DEFINE_list("models", ["all"], "of --table: which models")
    cli.parse()  # above the imports that take time

import json
import os
import re
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run: two of these may be at work

import jax
import numpy as np

from dit_jax import config as configs, flops, layout, sharding
from dit_jax.config import UserError
from dit_jax.hlo import Program
from dit_jax.layout import CHIPS, GIB
from dit_jax.logging import duration, say
from dit_jax.models.dit import MODELS
from dit_jax.runtime.files import write_aside

# Slices by the names of Cloud TPU (v2 to v5p count cores, v5e and v6e chips), and their chips' grid.
_3D = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}
_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CORES = {8: "2x2", 32: "4x4", 64: "4x8", 128: "8x8", 256: "8x16", 512: "16x16"}
SLICES = {f"{name}-{n}": f"{name}:{grid}" for name, grids in (
    ("v2", _CORES), ("v3", _CORES | {1024: "16x32", 2048: "32x32"}), ("v4", _3D), ("v5e", _2D), ("v5p", _3D),
    ("v6e", _2D)) for n, grid in grids.items()}


def find_devices(topology):
    """"v3:8x16" or "v3-256" -> the compile-only devices of that slice."""
    from jax.experimental import topologies

    name = SLICES.get(topology, topology)
    if name not in SLICES.values():
        raise UserError(f"--topology={topology}: unknown; the known ones are "
                        + ", ".join(f"{short} = {long}" for short, long in SLICES.items()))
    # JAX drives both cores of a v4 chip as one device.
    extra = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices
    except Exception as e:
        raise UserError(f"--topology={topology}: libtpu cannot make it ({str(e).strip().splitlines()[0][:200]}); is "
                        "libtpu installed (pip install -e '.[preflight]')?") from None


def _program(config, mesh, what):
    """(the jitted function, the shapes it is called with, how many images one call takes or makes)."""
    from dit_jax import train

    if what in ("encode", "decode"):
        return _vae_program(config["model"], mesh, what)
    model, batch = config["model"], config["batch_size"]
    init, step, target = train.make_programs(config, mesh)
    across = sharding.batch_sharding(mesh)
    if what == "train":
        size = (batch, model["input_size"], model["input_size"], model["in_channels"])
        return step, (target, {"x": jax.ShapeDtypeStruct(size, np.float32, sharding=across),
                               "y": jax.ShapeDtypeStruct((batch,), np.int32, sharding=across)}), batch
    generator = train.make_generator(config, mesh, target)
    n = generator.batch_size
    return generator.run, (target.ema, jax.ShapeDtypeStruct((n,), np.int32, sharding=across),
                           jax.ShapeDtypeStruct((n,), np.uint32, sharding=across)), n


def _vae_program(model, mesh, what):
    """_program of the published VAE at the size that the model's latents stand for."""
    from dit_jax import autoencoder
    from dit_jax.models import vae

    codec = autoencoder.Autoencoder(vae.PUBLISHED, vae.abstract(**vae.PUBLISHED)[1])
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
    return (autoencoder.over_devices(function, mesh),
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
    """The report of a resolved config on a slice, as a dict of plain values. Raises ValueError and UserError."""
    devices = find_devices(topology)
    chip = CHIPS[devices[0].device_kind]
    config = layout.settle(config, devices)
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
        "versions": {"jax": jax.__version__, "libtpu": _libtpu_version()},
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


def _libtpu_version():
    from importlib.metadata import version
    return version("libtpu")


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
    from dit_jax.diffusion.schedule import linear_schedule, respace
    return len(respace(linear_schedule(config["diffusion"]["timesteps"]), config["sample"]["steps"]))


def _gib(n):
    return f"{n / GIB:.2f} GiB"


def text(r):
    """The report as a person reads it."""
    lines = [f"{r['model'] or 'DiT'}, {r['what']}, on {r['topology']}: {r['devices']} devices on {r['chips']} {r['chip']} "
             f"chips, mesh {r['mesh']}, {r['dtype']}" + (
                 f", {'scanned' if r['scan'] else 'unrolled'} blocks, remat {r['remat']}" if r["remat"] else ""),
             f"compiled in {r['compile_seconds']} s (traced and lowered in {r['lower_seconds']} s)", ""]
    capacity = f"of {_gib(r['hbm_capacity_bytes'])} that libtpu leaves to a device's program"
    if r["fits"]:
        lines += [f"fits: {_gib(r['hbm_peak_bytes'])} {capacity}, by XLA's memory analysis"]
    elif r["hbm_peak_bytes"]:
        lines += [f"DOES NOT FIT: {_gib(r['hbm_peak_bytes'])} {capacity}, "
                  f"{_gib(r['hbm_peak_bytes'] - r['hbm_capacity_bytes'])} too much"]
    else:
        lines += [f"DOES NOT FIT: {r['compiler_says']}"]
    if "advice" in r:
        lines += ["what would make it fit, by an estimate:", *(f"  {a}" for a in r["advice"])]
    if "step_time_bound_s" not in r:
        return "\n".join(lines)
    rates, bounds = r["peak_figures"], r["bounds_s"]
    own = f"the model's own {r['model_flops_per_device'] / 1e12:.4g}; " if r["model_flops_per_device"] else ""
    unit = "step" if r["what"] == "train" else f"{r['images_per_step']} images"
    lines += [
        f"  arguments {_gib(r['hbm_arguments_bytes'])}, outputs {_gib(r['hbm_outputs_bytes'])} (of these "
        f"{_gib(r['hbm_aliased_bytes'])} in the arguments' place), temporaries {_gib(r['hbm_temporaries_bytes'])}, program "
        f"{_gib(r['hbm_program_bytes'])}", "",
        f"a device, a {unit}:" if r["what"] == "train" else f"a device, {unit}:",
        f"  arithmetic  {r['matrix_flops_per_device'] / 1e12:.4g} TFLOP in matrix products, "
        f"{r['flops_per_device'] / 1e12:.4g} in all ({own}XLA counts {r['xla_flops_per_device'] / 1e12:.4g}, a loop's body "
        "once)",
        f"  bytes       {r['bytes_per_device'] / 1e9:.4g} GB, {r['hbm_bytes_per_device'] / 1e9:.4g} GB of them in HBM (XLA "
        f"counts {r['xla_bytes_per_device'] / 1e9:.4g}, a loop's body once)",
        f"  collectives {r['interconnect_bytes_into_a_chip'] / 1e9:.4g} GB into each chip at least",
        *(f"    {kind:20s} {c['count']:6d} x, {c['bytes'] / 1e9:.4g} GB" for kind, c in r["collectives"].items()), "",
        f"lower bounds of a {unit}, not timings (peak figures: {rates['source']}):" if r["what"] == "train" else
        f"lower bounds of {unit}, not timings (peak figures: {rates['source']}):",
        f"  arithmetic   {bounds['arithmetic'] * 1e3:9.2f} ms at {rates['flops_per_s'] / 1e12:.4g} bfloat16 TFLOP/s a device"
        + (f", {r['bfloat16_passes']} passes a product" if r["bfloat16_passes"] > 1 else ""),
        f"  memory       {bounds['memory'] * 1e3:9.2f} ms at {rates['hbm_bytes_per_s'] / 1e9:.4g} GB/s a device",
        f"  interconnect {bounds['interconnect'] * 1e3:9.2f} ms at "
        f"{rates['interconnect_bytes_per_s_into_a_chip'] / 1e9:.4g} GB/s into a chip",
        f"at best {r['step_time_bound_s'] * 1e3:.2f} ms ({r['bound_by']}), {r['images_per_s_bound']:.4g} images/s"]
    if r["what"] == "train":
        lines += [f"at that bound {duration(r['days_to_400k_steps_bound'] * 86400)} to 400 K steps, "
                  f"{duration(r['days_to_7m_steps_bound'] * 86400)} to 7 M"]
    if r["xla_estimate_s"] is not None:
        lines += [f"XLA's own estimate, op after op with nothing overlapped: {r['xla_estimate_s'] * 1e3:.1f} ms"]
    return "\n".join(lines)


TABLE_MODELS = [*MODELS, "DiT-XL/2-512"]
TABLE_SLICES = ["v3-8", "v3-32", "v3-256", "v4-32", "v5e-16", "v5e-256", "v6e-16"]


def table(slices, models):
    """Prints the chosen layout of each model on each slice as a table in Markdown."""
    known = [m for m in models if m not in TABLE_MODELS]
    if known:
        raise UserError(f"--models: unknown model {known[0]!r}: one of {', '.join(TABLE_MODELS)}")
    for name in slices:
        find_devices(name)
    say("| slice | model | data x fsdp x tensor | blocks, remat | peak HBM, GiB | GB a device | arithmetic, memory, "
        "interconnect, ms | images/s at best |")
    say("|---|---|---|---|---|---|---|---|")
    for name in slices:
        for model in models:
            config = configs.paper(model.removesuffix("-512"))
            config.model.input_size = 64 if model.endswith("-512") else 32
            r = examine(configs.resolve(config), name)
            mesh = " x ".join(str(r["mesh"][axis]) for axis in ("data", "fsdp", "tensor"))
            how = f"{'scanned' if r['scan'] else 'unrolled'}, {r['remat']}"
            if "bounds_s" in r:
                bounds = ", ".join(f"{1e3 * s:.3g}" for s in r["bounds_s"].values())
                rest = (f"{r['hbm_peak_bytes'] / GIB:.2f} of {r['hbm_capacity_bytes'] / GIB:.2f} | "
                        f"{r['bytes_per_device'] / 1e9:.3g} | {bounds} | {r['images_per_s_bound']:,.0f}")
            else:
                rest = "does not fit | | | "
            say(f"| {name} | {model} | {mesh} | {how} | {rest} |")


def main():
    f = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # an attached TPU is left alone
    jax.config.update("jax_enable_compilation_cache", False)  # without a TPU, a TPU's program cannot be read back
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("libtpu is missing: pip install -e '.[preflight]'") from None
    if f.table:
        names = TABLE_SLICES if f.table == ["all"] else f.table
        return table(names, TABLE_MODELS if f.models == ["all"] else f.models)
    if f.config is None:
        raise UserError("flag --config is missing: name a file, e.g. --config=configs/xl2.py")
    if not f.topology:
        raise UserError("--topology is missing: name a slice, e.g. --topology=v3-256")
    if f.out:
        cli.make_way(f.out)
    try:
        report = examine(configs.resolve(f.config), f.topology, f.what)
    except ValueError as e:
        raise UserError(str(e)) from None
    print(text(report), flush=True)
    if f.out:
        write_aside(f.out, (json.dumps(report, indent=2) + "\n").encode())
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    cli.run(main)
