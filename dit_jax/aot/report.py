"""What preflight prints: the report of a program, and the table of models and slices."""

from dit_jax import config as configs
from dit_jax.aot.estimate import examine
from dit_jax.aot.slices import find_devices
from dit_jax.models.dit import MODELS
from dit_jax.parallel.chips import GIB
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import duration, say


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
