"""Samples from a run, or from weights: python -m dit_jax.sample

    python -m dit_jax.sample --workdir=runs/digits --classes=3,7 --num=16
    python -m dit_jax.sample --weights=DiT-XL-2-256x256.pt --out=out --num=50000 --cfg_scale=1.5 --classes=random

Writes into --out: samples.npz with `arr_0` (N, H, W, 3) uint8, as the paper's evaluator reads it; grid.png of the
first images, with the names of their classes; with --png also single pictures; with --strip also strip.png, noise
turning into the first of them; and manifest.json, which says how they were made. The same command resumes. The samples
of a model of latents are decoded by the VAE of --vae, by default that of the run or of the weights. Without a VAE,
samples.npz holds `latents` (N, H, W, C) float32.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

CFG_SCALE = 4.0  # by default, as in the figures of the paper

if __name__ == "__main__":
    cli.define_samples(num=16, classes="balanced", cfg_scale=CFG_SCALE)
    cli.define_path("out", None, "folder to write to; by default WORKDIR/out")
    flags.DEFINE_bool("png", False, "also write single pictures")
    flags.DEFINE_bool("strip", False, "also write strip.png: noise turning into the first pictures, a row each")
    cli.parse()  # above the imports that take time

import os

from dit_jax.runtime import files, process
from dit_jax.runtime.errors import UserError
from dit_jax.sampling import output


def main() -> None:
    f = flags.FLAGS
    out = f.out or (f.workdir and os.path.join(f.workdir, "out"))
    process.one_step_at_a_time()
    if f.weights and not out:
        raise UserError("--out is missing: name a folder for the samples")
    if out:
        process.keep_compiled(os.path.join(out, "compiled"))
    samples = cli.samples(CFG_SCALE)
    if samples.model.latent and f.png:
        channels = samples.model.shape[-1]
        raise UserError(f"--png: this is a model of latents ({channels} channels): name a decoder with --vae")
    folders = ("parts", "damaged", "png") if f.png else ("parts", "damaged")
    cli.make_workdir(out, "out", files_in=("samples.npz", "manifest.json", "grid.png", "strip.png"), folders_in=folders)
    with files.hold(out, "out"):
        output.make(samples, out, f.png, f.strip)


if __name__ == "__main__":
    cli.run(main)
