"""Writes the statistics that samples are compared with: python -m dit_jax.reference

    python -m dit_jax.reference --source=tfds --name=imagenet2012 --path=/data/tfds --inception=FILE.pth --out=ref.npz
    python -m dit_jax.reference --path=pictures --size=64 --features=efflite0 --images=1000 --out=ref.npz

Pictures are decoded and cropped as for training, on all hosts, and go through the network on all devices. The file has
the keys of the published one: `mu`, `sigma`, `mu_s`, `sigma_s`, and with --images `arr_0`, that many of the pictures,
evenly spread, for precision and recall. Its `manifest` says how it was made.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_features()
    cli.define_source()
    cli.define_path("out", None, "the .npz file")
    flags.DEFINE_integer("images", 0, "how many pictures to keep in the file", lower_bound=0)
    cli.define_hosts()
    cli.parse()  # above the imports that take time

import os

import jax

from dit_jax import __version__
from dit_jax.data.pictures import evenly_spread, open_pictures, shares
from dit_jax.evaluation import features, measure, references
from dit_jax.parallel import layout, sharding
from dit_jax.runtime import hosts, process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.overlap import ahead
from dit_jax.runtime.progress import Progress, say


def main() -> None:
    f = flags.FLAGS
    if not f.path or not f.out:
        raise UserError(f"--{'path' if not f.path else 'out'} is missing")
    if not f.out.endswith(".npz"):
        raise UserError(f"--out={f.out}: must end in .npz")
    process.one_step_at_a_time()
    cli.make_parent(f.out)
    process.keep_compiled(os.path.join(os.path.dirname(os.path.abspath(f.out)), "compiled"))
    setting = f"--features_batch_size={f.features_batch_size} and --size={f.size}"
    pixel = 3 * (1 + 4)  # bytes of its three channels, in uint8 and in float32
    layout.check_memory({setting: pixel * f.features_batch_size * f.size**2}, jax.devices())
    network = features.load(sharding.make_mesh(), f.features, f.inception, f.features_batch_size)
    source = open_pictures(f.source, f.path, f.name, f.split, f.size, f.max_skipped)
    if f.images > len(source):
        raise UserError(f"--images={f.images}: there are {len(source)} pictures")
    progress = Progress("reference", len(source), "pictures")
    batches = ahead(shares(source, 4 * network.global_batch_size))
    measured = measure.measure_shares(network, batches, on_count=progress.update)
    progress.close()
    skipped = sum(hosts.share(len(source.skipped)))
    if skipped > f.max_skipped:
        raise UserError(f"{skipped} pictures cannot be used, more than --max_skipped={f.max_skipped}")
    if jax.process_index():
        return
    images = evenly_spread(source, f.images) if f.images else None
    manifest = {
        "data": source.identity,
        "count": measured.count,
        "skipped": skipped,
        "size": f.size,
        "features": network.name,
        "features_sha256": network.sha256,
        "versions": {"dit_jax": __version__, "jax": jax.__version__},
    }
    references.save_reference(f.out, measured, images, manifest)
    say(f"{measured.count:,} pictures, {skipped} skipped: {f.out}")


if __name__ == "__main__":
    cli.run(main)
