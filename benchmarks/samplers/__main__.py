"""Quality against evaluations of the network, for every sampler and objective: python -m benchmarks.samplers, from the
root of a checkout.

    python -m benchmarks.samplers --out=runs/samplers             # on 2 cores within an hour
    python -m benchmarks.samplers --out=runs/samplers --dry_run   # the plan: runs, commands, estimated time

One small network on 5,000 digits is trained for each objective and seed, with equal compute, by ordinary `train`
commands in OUT/runs. Each run is sampled with every sampler that fits its objective and 1 to 250 evaluations. The two
judges of the paper in miniature look at the samples. What they say is in OUT/results.json, of which OUT/report.md and
its plots are made. After any end the same command resumes.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_path("out", None, "output folder; created, or resumed if it exists")
    flags.DEFINE_enum(
        "budget",
        "small",
        ["small", "tiny"],
        "small: for 2 cores of a laptop; tiny: shows in two minutes that everything works, and decides nothing",
    )
    flags.DEFINE_integer("seed", 0, "the first seed of the runs", lower_bound=0, upper_bound=2**31)
    flags.DEFINE_bool("dry_run", False, "print the plan and do nothing")
    cli.parse()  # above the imports that take time

import os

from benchmarks.miniature import run
from benchmarks.samplers import page, results
from benchmarks.samplers.plan import Plan
from dit_jax.runtime import ending, files, process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say
from dit_jax.sampling.output import same_manifest


def main():
    f = flags.FLAGS
    process.cpu_only()
    if not f.out:
        raise UserError("--out is missing: name a folder")
    if os.path.exists(f.out) and not os.path.isdir(f.out):
        raise UserError(f"--out={f.out}: is no folder")
    plan = Plan(f.out, f.budget, f.seed)
    if f.dry_run:
        say("\n".join(plan.describe(len(run.slots()))))
        return
    ending.raise_on_signals()
    for folder in ("runs", "samples", "results", "logs"):
        cli.make_workdir(os.path.join(f.out, folder), "out")
    with files.hold(f.out, "out"):
        path = os.path.join(f.out, "plan.json")
        if not same_manifest(path, plan.manifest)[0]:
            run.write(path, plan.manifest)
        failed = run.carry_out(plan, results.judge)
        study = run.collect(plan, failed)
        page.write(study, os.path.join(f.out, "report.md"), os.path.join(f.out, "samples"))
    if failed:
        raise UserError(f"{len(failed)} failed, and {f.out}/report.md is of the rest: {next(iter(failed.values()))}")
    say(f"{f.out}/report.md")


if __name__ == "__main__":
    cli.run(main)
