"""The paper's claims in miniature, on digits that come through pip: python -m benchmarks.miniature, from the root of a
checkout.

    python -m benchmarks.miniature --out=runs/mini                    # everything; an hour and 10 minutes on 2 cores
    python -m benchmarks.miniature --out=runs/mini --study=blocks     # one question; others can be added later
    python -m benchmarks.miniature --out=runs/mini --dry_run          # the plan: runs, commands, estimated time
    python -m benchmarks.miniature --out=runs/again --seed=3 --beside=runs/mini   # does it come out the same again?

The studies: scaling (figures 2, 7, 8), blocks (figure 5), guidance (appendix A), sampling (figure 10), training
(figures 6, 9).

Each run is an ordinary `train` command in OUT/runs, and each set of samples an ordinary `sample` command in
OUT/samples. They run side by side on the cores of a CPU. Two judges, fitted on real training pictures, look at the
samples. What they say is in OUT/results, one JSON file a command, and at the end in OUT/results.json. OUT/report.md and
its plots are made of that file.

After any end the same command resumes. Where a command fails, the others continue, and the page says so.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

from benchmarks.miniature import STUDIES

if __name__ == "__main__":
    cli.define_path("out", None, "output folder; created, or resumed if it exists")
    flags.DEFINE_list("study", ",".join(STUDIES), f"one or more of {','.join(STUDIES)}")
    flags.DEFINE_enum(
        "budget",
        "small",
        ["small", "full", "tiny"],
        "small: for 2 cores of a laptop; full: for an "
        "accelerator; tiny: shows in minutes that everything works, and decides nothing",
    )
    flags.DEFINE_integer(
        "steps", None, "training steps of every run, a multiple of 8; by default the budget's", lower_bound=8
    )
    flags.DEFINE_integer(
        "samples",
        None,
        "pictures in a set, a multiple of 10; a distance is measured for each set; by default the budget's",
        lower_bound=10,
    )
    flags.DEFINE_integer("seed", 0, "the first seed; a model is trained with up to 3", lower_bound=0, upper_bound=2**31)
    cli.define_path(
        "beside",
        None,
        "a folder with the results.json of a study of another --seed; the page then says "
        "whether this study lies within its ranges",
    )
    flags.DEFINE_bool("dry_run", False, "print the plan and do nothing")
    cli.parse()  # above the imports that take time

import os

from benchmarks.miniature import page, run
from benchmarks.miniature.plan import Plan
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
    plan = Plan(f.out, f.budget, f.study, f.steps, f.samples, f.seed)
    earlier = run.earlier_study(f.beside, plan) if f.beside else None
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
        failed = run.carry_out(plan)
        everything = plan.with_studies(STUDIES)  # an earlier command's studies as well
        study = run.collect(everything, failed)
        page.write(everything, study, os.path.join(f.out, "report.md"), earlier)
    if failed:
        raise UserError(f"{len(failed)} failed, and {f.out}/report.md is of the rest: {next(iter(failed.values()))}")
    say(f"{f.out}/report.md")


if __name__ == "__main__":
    cli.run(main)
