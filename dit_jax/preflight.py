"""Compiles a run ahead of time for a TPU slice that you do not have: python -m dit_jax.preflight

    python -m dit_jax.preflight --config=configs/xl2.py --topology=v3:8x16
    python -m dit_jax.preflight --config=configs/xl2.py --topology=v5e-16 --what=sample --out=report.json
    python -m dit_jax.preflight --config=configs/xl2_512.py --topology=v3-8 --what=decode
    python -m dit_jax.preflight --table=v3-8,v3-256 --models=DiT-XL/2,DiT-XL/2-512
    python -m dit_jax.preflight --table=v5e-1,v5e-8 --models=DiT-XL/2 --what=sample

libtpu compiles the same program that `train` (or the sampler, or the VAE) runs, and says whether it fits. The times are
bounds from the chip's peak figures, not timings: a real step takes longer. The exit status is 1 if the program does not
fit.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_config(required=False)
    flags.DEFINE_string("topology", None, "the slice: v3:8x16 or v3-256")
    flags.DEFINE_enum(
        "what",
        "train",
        ["train", "sample", "encode", "decode"],
        "the training step, the sampler with config.sample, or the published VAE at the size of the model",
    )
    per_device_help = "for sample: images at once on a device; by default a grid's in all, and 32 for --table"
    flags.DEFINE_integer("per_device", None, per_device_help, lower_bound=1)
    cli.define_path("out", None, "a JSON file for the report")
    flags.DEFINE_list("table", None, "prints a Markdown table of these slices (or all) and the paper's models instead")
    flags.DEFINE_list("models", ["all"], "the models of --table")
    cli.parse()  # above the imports that take time

import json
import sys

from dit_jax import config as configs
from dit_jax.aot import report
from dit_jax.aot.estimate import estimate_run
from dit_jax.runtime import process, progress
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import write_aside


def main() -> int:
    f = flags.FLAGS
    process.cpu_only()  # an attached TPU is left alone
    process.no_compilation_cache()
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError("libtpu is missing: pip install -e '.[preflight]'") from None
    if f.table:
        slices = report.TABLE_SLICES if f.table == ["all"] else f.table
        models = report.TABLE_MODELS if f.models == ["all"] else f.models
        if f.what not in ("train", "sample"):
            raise UserError(f"--what={f.what}: --table is of train or sample")
        progress.silence.stream = sys.stderr  # stdout is the table
        report.table(slices, models, f.what, f.per_device or 32)
        return 0
    if f.config is None:
        raise UserError("flag --config is missing: name a file, e.g. --config=configs/xl2.py")
    if not f.topology:
        raise UserError("--topology is missing: name a slice, e.g. --topology=v3-256")
    if f.out:
        cli.make_parent(f.out)
    result = estimate_run(configs.resolve(f.config), f.topology, f.what, f.per_device)
    progress.say(report.text(result))
    if f.out:
        write_aside(f.out, (json.dumps(result, indent=2) + "\n").encode())
    return 0 if result["fits"] else 1


if __name__ == "__main__":
    cli.run(main)
