"""What preflight prints: the report of a program, and the table of models and slices."""

from typing import Any

from dit_jax import config as configs
from dit_jax.aot.estimate import estimate_run
from dit_jax.aot.slices import find_devices
from dit_jax.models.dit import MODELS
from dit_jax.parallel.chips import GIB
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import duration, say


def _gib(n):
    return f"{n / GIB:.2f} GiB"


def text(r: dict[str, Any]) -> str:
    """Returns a report of estimate_run as it is printed."""
    blocks = f", {'scanned' if r['scan'] else 'unrolled'} blocks, remat {r['remat']}" if r["remat"] else ""
    blocks += f", a batch in {r['accumulate']} parts" if r["accumulate"] > 1 else ""
    blocks += f", attention {r['attention']}" if r["attention"] != "xla" else ""
    lines = [
        f"{r['model'] or 'DiT'}, {r['what']}, on {r['topology']}: {r['devices']} devices on {r['chips']} {r['chip']} "
        f"chips, mesh {r['mesh']}, {r['dtype']}{blocks}",
        f"compiled in {r['compile_seconds']} s (traced and lowered in {r['lower_seconds']} s)",
        "",
        _verdict(r),
    ]
    if "advice" in r:
        lines += ["what would make it fit, by an estimate:", *(f"  {advice}" for advice in r["advice"])]
    if "step_time_bound_s" in r:
        lines += [*_amounts(r), *_bounds(r)]
    if "not_understood" in r:
        lines += ["", f"NO BOUNDS: {r['not_understood']}, and this command cannot count that"]
    return "\n".join(lines)


def _verdict(r):
    capacity = f"of {_gib(r['hbm_capacity_bytes'])} that libtpu leaves to a device's program"
    if r["fits"]:
        return f"fits: {_gib(r['hbm_peak_bytes'])} {capacity}, by XLA's memory analysis"
    if r["hbm_peak_bytes"]:
        excess = r["hbm_peak_bytes"] - r["hbm_capacity_bytes"]
        return f"DOES NOT FIT: {_gib(r['hbm_peak_bytes'])} {capacity}, {_gib(excess)} too much"
    return f"DOES NOT FIT: {r['compiler_says']}"


def _unit(r):
    return "a step" if r["what"] == "train" else f"{r['images_per_step']} images"


def _amounts(r):
    """Returns the lines on memory, arithmetic, bytes and collectives."""
    teraflops = {key: f"{r[f'{key}_per_device'] / 1e12:.4g}" for key in ("matrix_flops", "flops", "xla_flops")}
    gigabytes = {key: f"{r[f'{key}_per_device'] / 1e9:.4g}" for key in ("bytes", "hbm_bytes", "xla_bytes")}
    model_flops = r["model_flops_per_device"]
    model_part = f"the model's own {model_flops / 1e12:.4g}; " if model_flops else ""
    return [
        f"  arguments {_gib(r['hbm_arguments_bytes'])}, outputs {_gib(r['hbm_outputs_bytes'])} "
        f"(of these {_gib(r['hbm_aliased_bytes'])} in the arguments' place), "
        f"temporaries {_gib(r['hbm_temporaries_bytes'])}, program {_gib(r['hbm_program_bytes'])}",
        "",
        f"a device, {_unit(r)}:",
        f"  arithmetic  {teraflops['matrix_flops']} TFLOP in matrix products, {teraflops['flops']} in all "
        f"({model_part}XLA counts {teraflops['xla_flops']}, a loop's body once)",
        f"  bytes       {gigabytes['bytes']} GB, {gigabytes['hbm_bytes']} GB of them in HBM "
        f"(XLA counts {gigabytes['xla_bytes']}, a loop's body once)",
        *(f"    {kind:35s} {moved / 1e9:9.4g} GB" for kind, moved in r["hbm_bytes_by_kind"].items()),
        f"  collectives {r['interconnect_bytes_into_a_chip'] / 1e9:.4g} GB into each chip at least",
        *(f"    {kind:20s} {c['count']:6d} x, {c['bytes'] / 1e9:.4g} GB" for kind, c in r["collectives"].items()),
    ]


def _bounds(r):
    """Returns the lines on the lower bounds of the time."""
    rates, milliseconds = r["peak_figures"], {name: f"{1e3 * s:9.2f} ms" for name, s in r["bounds_s"].items()}
    passes = f", {r['bfloat16_passes']} passes a product" if r["bfloat16_passes"] > 1 else ""
    link = rates["interconnect_bytes_per_s_into_a_chip"]
    lines = [
        "",
        f"lower bounds of {_unit(r)}, not timings (peak figures: {rates['source']}):",
        f"  arithmetic   {milliseconds['arithmetic']} at {rates['flops_per_s'] / 1e12:.4g} bfloat16 TFLOP/s a device"
        f"{passes}",
        f"  memory       {milliseconds['memory']} at {rates['hbm_bytes_per_s'] / 1e9:.4g} GB/s a device",
        f"  interconnect {milliseconds['interconnect']} at {link / 1e9:.4g} GB/s into a chip",
        f"at best {r['step_time_bound_s'] * 1e3:.2f} ms ({r['bound_by']}), {r['images_per_s_bound']:.4g} images/s",
    ]
    if r["what"] == "train":
        times = [duration(r[f"days_to_{steps}_steps_bound"] * 86400) for steps in ("400k", "7m")]
        lines.append(f"at that bound {times[0]} to 400 K steps, {times[1]} to 7 M")
    if r["xla_estimate_s"] is not None:
        lines.append(f"XLA's own estimate, op after op with nothing overlapped: {r['xla_estimate_s'] * 1e3:.1f} ms")
    return lines


TABLE_MODELS = [*MODELS, "DiT-XL/2-512"]
TABLE_SLICES = ["v3-8", "v3-32", "v3-256", "v4-32", "v5e-16", "v5e-256", "v6e-16"]


TRAIN_COLUMNS = (
    "data x fsdp x tensor",
    "blocks, remat, parts, kernel",
    "peak HBM, GiB",
    "GB a device",
    "arithmetic, memory, interconnect, ms",
    "images/s at best",
)
SAMPLE_COLUMNS = (
    "images at once",
    "peak HBM, GiB",
    "GB between chips",
    "arithmetic, memory, interconnect, s",
    "images/s at best",
    "50,000 at best",
)


def table(slices: list[str], models: list[str], what: str = "train", per_device: int = 32) -> None:
    """Prints a Markdown table of the chosen layout of each model on each slice. Raises UserError for unknown names.

    what: "train", or "sample": the paper's 250 guided steps, with `per_device` images at once on each device.
    """
    unknown = [model for model in models if model not in TABLE_MODELS]
    if unknown:
        raise UserError(f"--models: unknown model {unknown[0]!r}: one of {', '.join(TABLE_MODELS)}")
    if not models:
        raise UserError(f"--models is empty: name some of {', '.join(TABLE_MODELS)}")
    for topology in slices:
        find_devices(topology, "table")
    columns = "slice", "model", *(TRAIN_COLUMNS if what == "train" else SAMPLE_COLUMNS)
    say(f"| {' | '.join(columns)} |")
    say("|" + len(columns) * "---|")
    for topology in slices:
        for model in models:
            r = estimate_paper(model, topology, what, per_device if what == "sample" else None)
            say(f"| {topology} | {model} | {train_row(r) if what == 'train' else _sample_row(r)} |")


def estimate_paper(
    model: str, topology: str, what: str = "train", per_device: int | None = None, attention: str = "auto"
) -> dict[str, Any]:
    """Returns estimate_run of the paper's run of one of TABLE_MODELS. attention: as config.model.attention."""
    config = configs.paper(model.removesuffix("-512"))
    size = 64 if model.endswith("-512") else 32
    config.update_from_flattened_dict({"model.input_size": size, "model.attention": attention})
    return estimate_run(configs.resolve(config), topology, what, per_device)


def _sample_row(r):
    if "bounds_s" not in r:
        return f"{r['images_per_step']:,} | does not fit | | | | "
    bounds, rate = ", ".join(f"{s:.3g}" for s in r["bounds_s"].values()), r["images_per_s_bound"]
    return (
        f"{r['images_per_step']:,} | {r['hbm_peak_bytes'] / GIB:.2f} of {r['hbm_capacity_bytes'] / GIB:.2f} | "
        f"{r['interconnect_bytes_into_a_chip'] / 1e9:.3g} | {bounds} | {rate:,.3g} | {duration(50_000 / rate)}"
    )


def train_row(r: dict[str, Any]) -> str:
    """Returns the cells of the TRAIN_COLUMNS of a report of estimate_run."""
    mesh = " x ".join(str(r["mesh"][axis]) for axis in ("data", "fsdp", "tensor"))
    parts = f", {r['accumulate']} parts" if r["accumulate"] > 1 else ""
    kernel = f", {r['attention']}" if r["attention"] != "xla" else ""
    layout = f"{mesh} | {'scanned' if r['scan'] else 'unrolled'}, {r['remat']}{parts}{kernel}"
    if "bounds_s" not in r:
        return f"{layout} | {'not understood' if r['fits'] else 'does not fit'} | | | "
    bounds = ", ".join(f"{1e3 * s:.3g}" for s in r["bounds_s"].values())
    return (
        f"{layout} | {r['hbm_peak_bytes'] / GIB:.2f} of {r['hbm_capacity_bytes'] / GIB:.2f} | "
        f"{r['bytes_per_device'] / 1e9:.3g} | {bounds} | {r['images_per_s_bound']:,.0f}"
    )
