"""Samples a run in many ways in one process, which shares what starting costs: the command of the study's tasks.

    python -m benchmarks.samplers.draw --workdir=RUN --out=FOLDER --settings=unipc-8,ddpm-250

Writes FOLDER/unipc-8.npy and so on, pictures (N, H, W, 3) uint8 of all classes in turn. What is there is kept.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_path("workdir", None, "run directory")
    cli.define_path("out", None, "folder to write to")
    flags.DEFINE_list("settings", None, "SAMPLER-EVALUATIONS, one or more")
    flags.DEFINE_integer("num", 100, "pictures of each setting", lower_bound=1)
    flags.DEFINE_float("cfg_scale", 1.0, "guidance scale; 1 is none")
    flags.DEFINE_integer("seed", 0, "of the noise", lower_bound=0)
    cli.parse()  # above the imports that take time

import io
import os

import numpy as np

import dit_jax
from dit_jax.runtime import process
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import say

BATCH = 100  # pictures at once: with more, activations do not fit a core's cache, and each takes longer


def main():
    f = flags.FLAGS
    process.keep_compiled()
    os.makedirs(f.out, exist_ok=True)
    model = dit_jax.load(f.workdir)
    for setting in f.settings:
        path = os.path.join(f.out, f"{setting}.npy")
        if os.path.exists(path):
            continue
        sampler, _, evaluations = setting.rpartition("-")
        images = model.sample(
            num=f.num,
            cfg_scale=f.cfg_scale,
            cfg_channels=0,
            sampler=sampler,
            steps=evaluations,
            seed=f.seed,
            batch_size=BATCH,
            progress=False,
        )
        file = io.BytesIO()
        np.save(file, images)
        write_aside(path, file.getvalue())
        say(path)


if __name__ == "__main__":
    cli.run(main)
