"""Makes an average of a run's weights after training, of any width: python -m dit_jax.average

    python -m dit_jax.average --workdir=runs/xl2 --std=0.1
    python -m dit_jax.sample --workdir=runs/xl2 --which=std0.1

The run must have been started with --config.average.every=N. It then writes snapshots of two averages, and the average
of another width is a sum of these (EDM2, arXiv 2312.02696). The width is a standard deviation as a share of the length
of training: 0.1 averages mostly over the last quarter. Writes WORKDIR/averages/std0.1/STEP.npz.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_path("workdir", None, "run directory", required=True)
    flags.DEFINE_float("std", None, "width of the average, as a share of the length of training", required=True)
    flags.DEFINE_integer("step", None, "the step of a snapshot, where the average ends; by default the newest")
    cli.parse()  # above the imports that take time

from dit_jax import config as configs
from dit_jax.runtime import process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say
from dit_jax.training import averages
from dit_jax.weights import snapshots


def main() -> None:
    f = flags.FLAGS
    process.cpu_only()
    lowest, highest = configs.AVERAGE_STD
    if not lowest <= f.std <= highest:
        raise UserError(
            f"--std={f.std}: must be between {lowest} and {highest}; the uniform average of all steps has 0.289"
        )
    name = configs.average_name(f.std)
    steps = averages.snapshot_steps(f.workdir, f.step)
    cli.make_parent(snapshots.path_of(f.workdir, name, steps[-1]), "workdir")
    path, made = averages.make(f.workdir, f.std, steps)
    say(
        f"{path}: made of the snapshots of {len(steps)} steps, {steps[0]} to {steps[-1]}; its profile differs from the "
        f"exact one by {made['distance']:.2g} of its norm. Use it with --which={name}"
    )


if __name__ == "__main__":
    cli.run(main)
