"""Real pictures and a small VAE to try the path of ImageNet on: python -m dit_jax.example --out=runs/photos

Writes OUT/pictures, crops of the three photographs that come with scikit-learn and matplotlib, one class folder each,
and OUT/vae, an autoencoder of the published format, fitted to them in a minute or two. It stands in for Stable
Diffusion's, whose weights no package brings: latents of an eighth of the size and 4 channels, but blurred.
"""

from dit_jax import cli

from absl import flags

if __name__ == "__main__":
    cli.define_path("out", None, "folder to write to", required=True)
    flags.DEFINE_integer("per_class", 100, "crops of each photograph", lower_bound=1)
    flags.DEFINE_integer("steps", 600, "of fitting the VAE", lower_bound=2)
    cli.parse()  # above the imports that take time

import os

import jax
import numpy as np

from dit_jax.data import photographs
from dit_jax.runtime import images as pictures
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.progress import say
from dit_jax.vae import files as vae_files, fit


def main():
    f = flags.FLAGS
    cli.make_workdir(f.out, "out")
    rng = np.random.default_rng(0)
    images = photographs.write_crops(os.path.join(f.out, "pictures"), f.per_class, rng)
    params, scale = fit.fit(images, f.steps, rng)
    folder = os.path.join(f.out, "vae")
    vae_files.save(folder, fit.VAE, params, scale)
    model = vae_files.load(folder)
    shown = images[:: max(1, len(images) // 12)][:12]
    mean, _ = jax.jit(model.encode)(model.params, shown)
    again = np.asarray(jax.jit(model.decode)(model.params, mean * scale))
    error = np.mean((np.clip(again, -1, 1) - (shown / 127.5 - 1)) ** 2) / 4
    write_aside(os.path.join(f.out, "vae.png"), pictures.png(pictures.grid(
        np.concatenate([shown, pictures.to_uint8(again)]), len(shown))))
    say(f"{len(images)} pictures of {len(photographs.photographs())} classes in {f.out}/pictures; {folder}: a VAE that brings them back "
        f"with a PSNR of {-10 * np.log10(error):.1f} dB ({f.out}/vae.png: above as they were, below as they come back)")


if __name__ == "__main__":
    cli.run(main)
