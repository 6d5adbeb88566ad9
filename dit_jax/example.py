"""Makes a small picture data set and a small VAE for it: python -m dit_jax.example --out=runs/photos

With them every step of training on ImageNet can be tried. Writes OUT/pictures, crops of the seven photographs that
come with scikit-image, scikit-learn and matplotlib, one class folder for each photograph, and OUT/vae, an autoencoder
in the published format, fitted to the crops in some minutes. It replaces Stable Diffusion's VAE, which no Python
package contains: its latents also have 4 channels and an eighth of the size, but its pictures are blurred. Needs
pip install -e '.[photos]'.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_path("out", None, "output directory; created if it does not exist", required=True)
    flags.DEFINE_integer("per_class", 100, "crops of each photograph", lower_bound=1)
    flags.DEFINE_integer("steps", 600, "training steps of the VAE", lower_bound=2)
    cli.parse()  # above the imports that take time

import os

import jax
import numpy as np

from dit_jax.data.photographs import more_photographs, write_crops
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.images import grid, png, to_uint8
from dit_jax.runtime.progress import say
from dit_jax.vae import files as vae_files
from dit_jax.vae.fit import VAE, fit


def main() -> None:
    f = flags.FLAGS
    cli.make_workdir(f.out, "out")
    rng = np.random.default_rng(0)
    images = write_crops(os.path.join(f.out, "pictures"), more_photographs(), f.per_class, rng)
    params, scale = fit(images, f.steps, rng)
    folder = os.path.join(f.out, "vae")
    vae_files.save(folder, VAE, params, scale)
    vae = vae_files.load(folder)
    shown = images[:: max(1, len(images) // 12)][:12]
    mean, _ = jax.jit(vae.encode)(vae.params, shown)
    decoded = np.asarray(jax.jit(vae.decode)(vae.params, mean * scale))
    error = np.mean((np.clip(decoded, -1, 1) - (shown / 127.5 - 1)) ** 2) / 4
    rows = np.concatenate([shown, to_uint8(decoded)])
    write_aside(os.path.join(f.out, "vae.png"), png(grid(rows, len(shown))))
    classes = len(images) // f.per_class
    say(f"{f.out}/pictures: {len(images)} pictures in {classes} classes")
    say(f"{folder}: a VAE that reconstructs them with a PSNR of {-10 * np.log10(error):.1f} dB")
    say(f"{f.out}/vae.png: pictures (top row) and their reconstructions (bottom row)")


if __name__ == "__main__":
    cli.run(main)
