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
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from dit_jax import autoencoder, pictures
from dit_jax.logging import Progress, say
from dit_jax.models import vae
from dit_jax.runtime.files import write_aside

SIZE = 64
VAE = dict(block_out_channels=(8, 16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=4, in_channels=3)


def photographs():
    """{name: (H, W, 3) uint8} of the photographs that come with the packages."""
    import matplotlib
    from sklearn.datasets import load_sample_images

    found = dict(zip(("china", "flower"), load_sample_images().images))
    hopper = os.path.join(os.path.dirname(matplotlib.__file__), "mpl-data", "sample_data", "grace_hopper.jpg")
    return found | {"hopper": np.asarray(Image.open(hopper).convert("RGB"))}


def write_crops(folder, per_class, rng):
    """JPEG files FOLDER/CLASS/NUMBER.jpg of random crops, 128 to 256 pixels a side -> (N, SIZE, SIZE, 3) uint8, scaled."""
    small = []
    for name, photograph in photographs().items():
        height, width, _ = photograph.shape
        for i in range(per_class):
            side = rng.integers(128, 257)
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            crop = Image.fromarray(photograph[top: top + side, left: left + side])
            path = os.path.join(folder, name, f"{i:03d}.jpg")
            write_aside(path, pictures.encoded(crop, "jpeg", quality=95))
            small.append(np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(small)


def fit(images, steps, rng, batch_size=8):
    """A VAE fitted to images (N, S, S, 3) uint8 -> (its parameters, the scale by which its latents have deviation 1)."""
    graphdef, params = nnx.split(vae.VAE(**VAE, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 4e-3, min(50, steps // 2), steps))

    def loss(params, x, key):
        model = nnx.merge(graphdef, params)
        mean, logvar = model.encode(x)
        reconstruction = model.decode(mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape))
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        return jnp.mean(jnp.abs(reconstruction - x)) + 1e-3 * kl

    @jax.jit
    def step(params, state, x, key):
        value, grads = jax.value_and_grad(loss)(params, x, key)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, progress = optimizer.init(params), Progress("vae", steps, "steps")
    for i in range(steps):
        x = images[rng.integers(len(images), size=batch_size)] / np.float32(127.5) - 1
        x = np.where(rng.random((batch_size, 1, 1, 1)) < 0.5, x, x[:, :, ::-1])
        params, state, value = step(params, state, x, jax.random.key(i))
        progress.update(i + 1, f"loss {value:.3f}")
    progress.close()
    mean, _ = jax.jit(lambda params, x: nnx.merge(graphdef, params).encode(x))(params, images[::5] / np.float32(127.5) - 1)
    return params, float(1 / mean.std())


def main():
    f = flags.FLAGS
    cli.make_workdir(f.out, "out")
    rng = np.random.default_rng(0)
    images = write_crops(os.path.join(f.out, "pictures"), f.per_class, rng)
    params, scale = fit(images, f.steps, rng)
    folder = os.path.join(f.out, "vae")
    autoencoder.save(folder, VAE, params, scale)
    model = autoencoder.load(folder)
    shown = images[:: max(1, len(images) // 12)][:12]
    mean, _ = jax.jit(model.encode)(model.params, shown)
    again = np.asarray(jax.jit(model.decode)(model.params, mean * scale))
    error = np.mean((np.clip(again, -1, 1) - (shown / 127.5 - 1)) ** 2) / 4
    write_aside(os.path.join(f.out, "vae.png"), pictures.png(pictures.grid(
        np.concatenate([shown, pictures.to_uint8(again)]), len(shown))))
    say(f"{len(images)} pictures of {len(photographs())} classes in {f.out}/pictures; {folder}: a VAE that brings them back "
        f"with a PSNR of {-10 * np.log10(error):.1f} dB ({f.out}/vae.png: above as they were, below as they come back)")


if __name__ == "__main__":
    cli.run(main)
