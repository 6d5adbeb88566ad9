"""Encodes pictures to a latent cache: python -m dit_jax.encode

    python -m dit_jax.encode --source=folder --path=pictures --vae=stabilityai/sd-vae-ft-ema --out=latents
    python -m dit_jax.encode --source=tfds --name=imagenet2012 --path=DATA_DIR --vae=VAE --size=512 --out=latents
    python -m dit_jax.encode --verify --out=latents

Writes to --out, in the format of dit_jax/data/latents.py, the VAE's posterior of every centre-cropped picture and of
its mirror image. After an interruption the same command keeps the complete shards and makes the others, also on other
devices or another number of hosts; the finished folder is the same to the byte. In a finished folder it makes missing
and truncated shards again.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_source()
    cli.define_path("vae", None, "the VAE: a file, a folder, or a published name such as stabilityai/sd-vae-ft-ema")
    cli.define_path("out", None, "cache directory; created, or resumed if it exists")
    flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "number type of the cache")
    flags.DEFINE_enum("vae_dtype", "float32", ["float32", "bfloat16"], "number type of the VAE's activations")
    flags.DEFINE_integer("shard_size", 2048, "pictures in a shard", lower_bound=1)
    flags.DEFINE_bool("verify", False, "read every byte of the cache in --out and report damaged shards")
    cli.define_hosts()
    cli.process.same_threads()
    cli.parse()  # above the imports that take time

import os

import jax

from dit_jax.data import encoder
from dit_jax.data.latents import MANIFEST, SETTINGS
from dit_jax.data.pictures import open_pictures
from dit_jax.parallel import layout
from dit_jax.runtime import files, process
from dit_jax.runtime.errors import UserError
from dit_jax.vae import autoencoder
from dit_jax.vae.files import load


def main() -> int | None:
    f = flags.FLAGS
    if not f.out:
        raise UserError("--out is missing: name the folder of the cache")
    process.one_step_at_a_time()
    process.keep_compiled()
    return encoder.verify(f.out) if f.verify else encode(f)


def encode(f: flags.FlagValues) -> None:
    if not f.vae:
        raise UserError("--vae is missing: a file, a folder, or a published name such as stabilityai/sd-vae-ft-ema")
    out_in_path = f.path and os.path.realpath(f.out).startswith(os.path.join(os.path.realpath(f.path), ""))
    if out_in_path and f.source == "folder":
        raise UserError(f"--out={f.out}: lies in --path={f.path}, and would be one of its classes: name another folder")
    source = open_pictures(f.source, f.path, f.name, f.split, f.size, f.max_skipped)
    vae = load(f.vae, f.vae_dtype)
    if f.size % vae.factor:
        raise UserError(f"--size={f.size}: must be a multiple of {vae.factor}, which the VAE divides it by")
    # The largest activations: a few arrays of the encoder's first layers, and the attention weights in its middle.
    activations = 3 * vae.args["block_out_channels"][0] * f.size**2 + (f.size // vae.factor) ** 4
    layout.check_memory({f"--size={f.size}": 4 * autoencoder.batch_size(f.size) * activations}, jax.devices())
    cli.make_workdir(f.out, "out", files_in=(MANIFEST, SETTINGS, "preview.png"))
    with files.hold(f.out, "out"):
        encoder.make(
            f.out, source, vae, vae_dtype=f.vae_dtype, dtype=f.dtype, shard_size=f.shard_size, max_skipped=f.max_skipped
        )


if __name__ == "__main__":
    cli.run(main)
