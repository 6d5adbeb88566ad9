"""The statistics that samples are compared with, of any data: python -m dit_jax.reference

    python -m dit_jax.reference --source=tfds --name=imagenet2012 --path=/data/tfds --inception=FILE.pth --out=ref256.npz
    python -m dit_jax.reference --path=pictures --size=64 --features=efflite0 --images=1000 --out=ref.npz

Pictures are decoded and cropped as for training, over all devices and hosts; the file has the published one's keys:
`mu`, `sigma`, `mu_s`, `sigma_s`, and with --images `arr_0`, so many of the pictures, evenly spread, for precision and
recall; also `manifest`, how it was made.
"""

from dit_jax import cli

from absl import flags

if __name__ == "__main__":
    cli.define_features()
    cli.define_source()
    cli.define_path("out", None, "the .npz file")
    flags.DEFINE_integer("images", 0, "so many pictures are kept in the file", lower_bound=0)
    cli.define_hosts()
    cli.parse()  # above the imports that take time

import os

import jax

from dit_jax import __version__
from dit_jax.data.pictures import open_pictures, shares, spread
from dit_jax.evaluation import features, measure, references
from dit_jax.parallel import layout, sharding
from dit_jax.runtime import hosts, process
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.overlap import ahead
from dit_jax.runtime.progress import Progress, say


def main():
    f = flags.FLAGS
    if not f.path or not f.out:
        raise UserError(f"--{'path' if not f.path else 'out'} is missing")
    if not f.out.endswith(".npz"):
        raise UserError(f"--out={f.out}: must end in .npz")
    process.one_step_at_a_time()
    cli.make_way(f.out)
    process.keep_compiled(os.path.join(os.path.dirname(os.path.abspath(f.out)), "compiled"))
    layout.check_memory({f"--features_batch_size={f.features_batch_size} and --size={f.size}":
                         15 * f.features_batch_size * f.size**2}, jax.devices())  # uint8, float32
    network = features.load(sharding.make_mesh(), f.features, f.inception, f.features_batch_size)
    source = open_pictures(f.source, f.path, f.name, f.split, f.size, f.max_skipped)
    if f.images > len(source):
        raise UserError(f"--images={f.images}: there are {len(source)} pictures")
    progress = Progress("reference", len(source), "pictures")
    measured = measure.measure_shares(
        network, ahead(shares(source, 4 * len(network.owners))), on_count=progress.update)
    progress.close()
    skipped = sum(hosts.share(len(source.skipped)))
    if skipped > f.max_skipped:
        raise UserError(f"{skipped} pictures cannot be used, more than --max_skipped={f.max_skipped}")
    if jax.process_index():
        return
    images = spread(source, f.images) if f.images else None
    references.save_reference(f.out, measured, images, {
        "data": source.identity, "count": measured.count, "skipped": skipped, "size": f.size,
        "features": network.name, "features_sha256": network.sha256, "versions": {
            "dit_jax": __version__, "jax": jax.__version__}})
    say(f"{measured.count:,} pictures, {skipped} skipped: {f.out}")


if __name__ == "__main__":
    cli.run(main)
