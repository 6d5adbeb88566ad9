"""Converts weights between formats: python -m dit_jax.convert

    python -m dit_jax.convert --weights=DiT-XL-2-256x256.pt --out=xl2.npz   # or a file of SiT, or of a MeanFlow network
    python -m dit_jax.convert --workdir=runs/xl2 --out=xl2.pt   # a run's EMA weights; .pt needs the extra `torch`
    python -m dit_jax.convert --workdir=runs/xl2 --out=xl2_diffusers   # a folder for diffusers, with the VAE
    python -m dit_jax.convert --workdir=runs/xl2 --training --out=0400000.pt   # with the state of AdamW, for PyTorch

A weights file (.pt, .npz or .safetensors) maps the published names to float32 arrays. With --training it is a training
checkpoint instead, as DiT's and SiT's train.py write it: {model, ema, opt, args}. A folder is for
`diffusers.DiTPipeline.from_pretrained`. The network of diffusers differs from the published one in a constant that the
folder cannot set: timestep frequencies divide by 127, not 128. So its pictures differ slightly.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

if __name__ == "__main__":
    cli.define_path(
        "weights",
        None,
        "a .pt, .npz or .safetensors file of the published names, a diffusers folder, or a published name such as "
        "DiT-XL/2-256",
    )
    cli.define_path("workdir", None, "run directory, instead of --weights")
    flags.DEFINE_integer("step", None, "the checkpoint of the run; by default the newest")
    cli.define_which()
    flags.DEFINE_bool(
        "training", False, "write a training checkpoint of DiT's or SiT's train.py: raw and EMA weights, AdamW's state"
    )
    flags.DEFINE_integer(
        "num_heads", None, "number of attention heads; needed if the width is not one of the paper's", lower_bound=1
    )
    cli.define_objective()
    cli.define_path(
        "vae",
        None,
        "the VAE of a diffusers folder: a file, a folder or a published name such as stabilityai/sd-vae-ft-ema; by "
        "default that of the run or of the weights",
    )
    cli.define_path(
        "out", None, "the .pt, .npz or .safetensors file to write; any other name is a diffusers folder", required=True
    )
    cli.parse()  # above the imports that take time

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax import config as configs
from dit_jax.diffusion.objectives import DDPM, Objective
from dit_jax.parallel import layout, sharding
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.progress import say, waiting
from dit_jax.vae import files as vae_files
from dit_jax.weights import diffusers, files, load, published, training_checkpoint

EXTENSIONS = (".pt", ".npz", ".safetensors")


def main() -> None:
    f = flags.FLAGS
    if (f.workdir is None) == (f.weights is None):
        raise UserError("give exactly one of --workdir and --weights")
    for name in ("num_heads", "objective"):
        if f[name].value is not None and not f.weights:
            raise UserError(f"--{name} is of a weights file: give it with --weights; a run's config names its own")
    if f.training:
        if f.weights:
            raise UserError("--training: a weights file has no optimizer state: give a run with --workdir")
        if not f.out.endswith(".pt"):
            raise UserError(f"--training: writes a .pt file, and --out={f.out} is none")
        if f["which"].present:
            raise UserError(f"--which={f.which}: --training writes the raw and the EMA weights: leave --which out")
        if f.vae is not None:
            raise UserError(f"--vae={f.vae}: a training checkpoint has no VAE: leave --vae out")
        files.import_torch(f.out)
    if not os.path.isdir(os.path.dirname(os.path.abspath(f.out))):
        raise UserError(f"--out={f.out}: there is no such folder: make it first")
    folder = not f.out.endswith(EXTENSIONS)
    if f.out.endswith((".pth", ".bin", ".ckpt", ".zip", ".h5", ".msgpack")):
        raise UserError(f"--out={f.out}: weights are .pt, .npz or .safetensors files, or a diffusers folder")
    if folder:
        if os.path.isdir(f.out) and os.listdir(f.out):
            raise UserError(f"--out={f.out}: exists and is not empty: name another folder, or move this one away")
        cli.make_workdir(f.out, "out")
    else:
        cli.make_parent(f.out)
    args, flat = save_training(f.out, f.workdir, f.step) if f.training else save_weights(f, folder)
    size, channels = args["input_size"], args["in_channels"]
    classes = f"{args['num_classes']} classes" if args["num_classes"] else "unconditional"
    say(
        f"{f.out}: {len(flat)} arrays, {sum(a.size for a in flat.values()):,d} parameters; input {size} x {size} x "
        f"{channels}, patch {args['patch_size']}, {args['depth']} blocks of width {args['hidden_size']}, "
        f"{args['num_heads']} heads, {classes}"
    )


Written = tuple[dict[str, Any], dict[str, np.ndarray]]  # arguments of models.dit.DiT, published arrays


@waiting("converting the weights")
def save_weights(f: flags.FlagValues, folder: bool) -> Written:
    """Writes a weights file or a diffusers folder, as the flags say. Raises UserError."""
    if f.weights:
        source = load.open_source(f.weights, f.which)
        # Converted to our layout and back, so that the result is checked: this package can read it.
        args = published.infer_args(source.flat, f.num_heads or source.num_heads, source.num_classes)
        class_names, vae, objective = source.class_names, source.vae, source.objective or DDPM()
        if f.objective is not None:  # the published names do not depend on it
            objective = load.choose_objective(source, args, f.objective)
        flat = published.to_published(published.from_published(source.flat, args), args)
    else:
        loaded = load.from_run(f.workdir, sharding.make_mesh(devices=jax.devices()[:1]), f.which, f.step)
        args, class_names, vae, objective = loaded.args, loaded.class_names, loaded.vae, loaded.objective
        flat = published.to_published(loaded.params, args)
    if folder:
        save_folder(f.out, flat, args, class_names, objective, vae if f.vae is None else f.vae)
    else:
        files.write(f.out, flat)
    return args, flat


@waiting("converting the checkpoint")
def save_training(out: str, workdir: str, step: int | None) -> Written:
    """Writes the training checkpoint of a run. step: None for the newest. Raises UserError."""
    import optax  # these take a second to import, which files need not wait for

    from dit_jax.training import setup
    from dit_jax.training.step import to_items
    from dit_jax.weights.checkpoint import Checkpoints

    checkpoints, device = Checkpoints(workdir, read_only=True), jax.devices()[:1]
    config = layout.resolve_auto(checkpoints.latest_meta(step)["config"], device)
    args = configs.dit_args(config)
    line = training_checkpoint.command_line(config, args, configs.objective_of(config))
    try:  # the weights, the EMA, and two moments as they are read and as they are written
        layout.check_memory({name: 6 * size for name, size in layout.least_memory(args).items()}, device)
    except UserError as e:
        raise UserError(f"{workdir}: {e}") from None
    targets = to_items(setup.make_programs(config, sharding.make_mesh(devices=device))[2])
    step, params, _ = checkpoints.restore_params(step, "params", targets["params"])
    raw = published.to_published(params, args)
    ema = published.to_published(checkpoints.restore_params(step, "ema", targets["ema"])[1], args)
    state = checkpoints.restore_params(step, "optimizer", targets["optimizer"])[1]["opt_state"]
    checkpoints.close()
    mean, square = (published.to_published(optax.tree.get(state, name), args) for name in ("mu", "nu"))
    training_checkpoint.write(
        out,
        raw=raw,
        ema=ema,
        mean=mean,
        square=square,
        updates=int(optax.tree.get(state, "count")),
        optimizer=config["optimizer"],
        line=line,
    )
    return args, ema


def save_folder(
    folder: str,
    flat: Mapping[str, np.ndarray],
    args: dict[str, Any],
    class_names: Sequence[str] | None,
    objective: Objective,
    vae: str,
) -> None:
    """Writes a diffusers folder with the network and the VAE. Arguments: see weights.diffusers.save. Raises UserError.

    vae: a file, folder or published name.
    """
    diffusers.check(folder, args, objective)
    if not vae:
        raise UserError(
            "--vae is missing: a diffusers pipeline decodes latents: name a VAE's file, folder or published name"
        )
    codec, channels = vae_files.load(vae), args["in_channels"]
    if codec.latent_channels != channels:
        raise UserError(f"--vae={vae}: decodes {codec.latent_channels} channels, and the model makes {channels}")
    folder = os.path.abspath(folder)
    with tempfile.TemporaryDirectory(prefix=".dit_jax-", dir=os.path.dirname(folder)) as parent:
        aside = os.path.join(parent, os.path.basename(folder))
        vae_files.save(os.path.join(aside, "vae"), codec.args, codec.params, codec.scale)
        diffusers.save(aside, flat, args, class_names, objective)
        os.replace(aside, folder)  # which exists and is empty


if __name__ == "__main__":
    cli.run(main)
