"""Prepares imagenet2012 for tensorflow-datasets from the tar files of image-net.org, without TensorFlow.

python -m dit_jax.prepare --tars=DIR --path=DATA_DIR
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_path("tars", None, "folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar", required=True)
    cli.define_path("path", None, "data_dir of tensorflow-datasets to write to", required=True)
    flags.DEFINE_bool("partial", False, "accept a single tar file, or fewer pictures than ILSVRC2012 has")
    cli.parse()  # above the imports that take time

from dit_jax.data import imagenet
from dit_jax.runtime import files, process
from dit_jax.runtime.progress import say


def main() -> None:
    f = flags.FLAGS
    process.cpu_only()
    cli.make_workdir(f.path, "path")
    with files.hold(f.path, "path"):
        out = imagenet.prepare(f.tars, f.path, f.partial)
    flags_to_train = f"--config.data.source=tfds --config.data.name=imagenet2012 --config.data.path={f.path}"
    say(f"{out}: done. To train on it: {flags_to_train}")


if __name__ == "__main__":
    cli.run(main)
