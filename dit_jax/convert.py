"""Published weights in, our weights out: python -m dit_jax.convert

    python -m dit_jax.convert --weights=DiT-XL-2-256x256.pt --out=xl2.npz
    python -m dit_jax.convert --workdir=runs/xl2 --out=xl2.pt     # a run's EMA weights; .pt needs torch (the extra)

A weights file is a flat mapping from the published names to float32 arrays: `.pt` as published, `.npz` the same
names as plain NumPy arrays.
"""

from dit_jax import cli

from absl import flags

if __name__ == "__main__":
    cli.define_path("weights", None, "a .pt or .npz file of the published format")
    cli.define_path("workdir", None, "instead: a run's folder")
    flags.DEFINE_integer("step", None, "which checkpoint of the run; by default the newest")
    flags.DEFINE_enum("which", "ema", ["ema", "raw"], "EMA or raw weights")
    flags.DEFINE_integer("num_heads", None, "of weights whose width is none of the paper's", lower_bound=1)
    cli.define_path("out", None, "the .pt or .npz file to write", required=True)
    cli.parse()  # above the imports that take time

import os

import jax

from dit_jax.parallel import sharding
from dit_jax.runtime.errors import UserError
from dit_jax.weights import files, load, published


def main():
    f = flags.FLAGS
    if (f.workdir is None) == (f.weights is None):
        raise UserError("say --workdir=RUN or --weights=FILE, one of them")
    if not f.out.endswith((".pt", ".npz")):
        raise UserError(f"--out={f.out}: weights are .pt or .npz files")
    if not os.path.isdir(os.path.dirname(os.path.abspath(f.out))):
        raise UserError(f"--out={f.out}: there is no such folder")
    cli.make_way(f.out)
    if f.weights:
        flat = files.read(f.weights, f.which)
        # Read in and written out again, so that nothing leaves that this package would not take.
        args = published.infer_args(flat, f.num_heads)
        flat = published.to_published(published.from_published(flat, args), args)
    else:
        loaded = load.from_run(f.workdir, sharding.make_mesh(devices=jax.devices()[:1]), f.which, f.step)
        args, flat = loaded.args, published.to_published(loaded.params, loaded.args)
    files.write(f.out, flat)
    print(f"{f.out}: {len(flat)} arrays, {sum(a.size for a in flat.values()):,d} parameters; input {args['input_size']}"
          f" x {args['input_size']} x {args['in_channels']}, patch {args['patch_size']}, {args['depth']} blocks of width "
          f"{args['hidden_size']}, {args['num_heads']} heads, "
          + (f"{args['num_classes']} classes" if args["num_classes"] else "unconditional"))


if __name__ == "__main__":
    cli.run(main)
