"""How fast a config runs on this machine: python -m benchmarks.speed, from the root of a checkout.

    python -m benchmarks.speed --config=configs/s2.py --config.batch_size=8
    python -m benchmarks.speed --config=configs/b4.py --config.batch_size=8 --what=train --against=diffusers
    python -m benchmarks.speed --what=data --cache=/data/imagenet-latents --pictures=/data/imagenet/train
    python -m benchmarks.speed --report --out=runs/benchmarks    # the project's benchmarks.md, 40 minutes on 2 cores

--what names what is timed:

    train       a training step: forward, backward, AdamW, EMA
    denoise     one guided DDPM step
    sample      a whole sampling run, beside its steps alone
    decode      the VAE's decoder
    start       a command from its beginning to its first picture
    data        reading a latent cache and decoding pictures, beside PyTorch's DataLoader
    evaluation  the metrics, beside their usual forms
    scaling     how the time of a training step grows with batch, tokens and depth

--against=diffusers times PyTorch beside train, denoise, decode, start and scaling (pip install -e '.[benchmark]'), on
a CPU in float32. --against=pytorch times a plain DiT in PyTorch with torch.compile beside train, denoise and scaling,
on a GPU in bfloat16 if there is one:

    python -m benchmarks.speed --report --against=pytorch --out=runs/gpu

--out gets parts/, a JSON file of each thing timed. It also gets report.json, benchmarks.md and scaling.png, which are
made of all the parts that are there. So a part can be timed again alone, and --what= only makes the page anew.
"""

from dit_jax import cli  # before all else: from here on a signal is one line

# isort: split
from absl import flags

from benchmarks.speed import WHAT

if __name__ == "__main__":
    cli.define_config(required=False)
    flags.declare_key_flag("config")
    flags.DEFINE_list("what", None, f"what is timed: {','.join(WHAT)}; by default train,denoise, or with --report all")
    against_help = "what is timed beside it: PyTorch on diffusers' DiT, or on a plain one, compiled"
    flags.DEFINE_enum("against", None, ["diffusers", "pytorch"], against_help)
    report_help = "time the set that benchmarks.md is made of, beside diffusers; or with --against=pytorch a GPU's"
    flags.DEFINE_bool("report", False, report_help)
    cli.define_path("out", None, "a folder for the report and its parts")
    flags.DEFINE_integer(
        "rounds", 5, "timings of each thing; at most 3 or 1 of what takes long and has no target", lower_bound=1
    )
    flags.DEFINE_float(
        "seconds", 1.0, "the least duration of a timing; it decides how many calls one has", lower_bound=0
    )
    flags.DEFINE_integer("images", 4, "how many images are denoised at once", lower_bound=1)
    cli.define_path("vae", None, "for decode: a VAE's file or folder; by default noise of the published shape")
    cli.define_path("cache", None, "for data: a latent cache; by default one of noise, as of 256 px")
    cli.define_path("pictures", None, "for data: a folder of class folders; by default crops of photographs")
    flags.DEFINE_integer("num_latents", 8192, "for data: how many latents are made", lower_bound=512)
    cli.define_path(
        "scratch", None, "for data and start: a folder for what is made; by default the system's temporary folder"
    )
    flags.DEFINE_integer("samples", 50_000, "for evaluation: number of samples' features", lower_bound=4)
    flags.DEFINE_integer("references", 10_000, "for evaluation: number of the reference's features", lower_bound=4)
    flags.DEFINE_integer("width", 2048, "for evaluation: length of a feature", lower_bound=1)
    cli.parse()  # above the imports that take time

import importlib.util
import math
import os
import tempfile
from contextlib import ExitStack

from benchmarks.speed import parts, run
from dit_jax.runtime import ending, files, process
from dit_jax.runtime.errors import UserError


def asked_for():
    """Returns what is to be timed, names of WHAT. Raises UserError naming a flag that is wrong."""
    f = flags.FLAGS
    if not math.isfinite(f.seconds):
        raise UserError(f"--seconds={f.seconds}: how long a timing is at least, a number of seconds")
    if f.scratch is not None:
        cli.make_workdir(f.scratch, "scratch")
    all_of_it = f.report and f.against != "pytorch"
    what = (WHAT if all_of_it else ("train", "denoise")) if f.what is None else f.what
    for kind in what:
        if kind not in WHAT:
            raise UserError(f"--what={kind}: unknown; one or more of {','.join(WHAT)}")
    if f.report and f.config is not None:
        raise UserError("--report has its own configs: leave --config out")
    if not what and not f.out:
        raise UserError("--what is empty: name what is to be timed, or with --out the report to make anew")
    needed = {"diffusers": ("torch", "diffusers"), "pytorch": ("torch",), "": ()}
    for package in needed[against()]:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{'--report' if f.report else '--against'} needs {package}: pip install -e '.[benchmark]'")
    return what


def against():
    """Returns what PyTorch is timed on: "diffusers", "pytorch", or "" for not at all."""
    return flags.FLAGS.against or ("diffusers" if flags.FLAGS.report else "")


def main():
    f = flags.FLAGS
    ending.raise_on_signals()
    process.cpu_only()
    what = asked_for()
    settings = parts.Settings(
        against=against(),
        rounds=f.rounds,
        images=f.images,
        vae=f.vae or "",
        cache=f.cache,
        pictures=f.pictures,
        num_latents=f.num_latents,
        samples=f.samples,
        references=f.references,
        width=f.width,
    )
    with ExitStack() as held:
        report = None
        if f.out is not None:
            cli.make_workdir(f.out, "out")  # which refuses an empty name
            cli.make_workdir(os.path.join(f.out, "parts"), "out")
            held.enter_context(files.hold(f.out, "out"))
            report = run.Report(f.out)
        scratch = held.enter_context(tempfile.TemporaryDirectory(dir=f.scratch))
        todo = (
            parts.of_report(what, settings, scratch) if f.report else parts.of_config(what, f.config, settings, scratch)
        )
        run.carry_out(todo, f.seconds, report)


if __name__ == "__main__":
    cli.run(main)
