"""How fast a config runs on this machine: python -m dit_jax.benchmark

    python -m dit_jax.benchmark --config=configs/s2.py --config.batch_size=8
    python -m dit_jax.benchmark --config=configs/b4.py --config.batch_size=8 --what=train --against=diffusers
    python -m dit_jax.benchmark --what=data --cache=/data/imagenet-latents --pictures=/data/imagenet/train
    python -m dit_jax.benchmark --report --out=runs/benchmarks    # the project's benchmarks.md, 40 minutes on 2 cores

--what: train (forward, backward, AdamW, EMA), denoise (one guided DDPM step), sample (a whole run, and its steps alone),
decode (the VAE), start (a command from its beginning to its first picture), data, evaluation, scaling (how the training
step grows with batch, tokens and depth). Data and evaluation stand beside their usual forms; --against=diffusers sets
PyTorch beside all else but sample (pip install -e '.[benchmark]').

--out gets parts/, one JSON file of each thing timed, and made of all that are there report.json, benchmarks.md and
scaling.png: a part can be timed again alone, and with --what= the page is only made anew.
"""

from dit_jax import cli

from absl import flags

WHAT = ("train", "denoise", "sample", "decode", "start", "data", "evaluation", "scaling")

if __name__ == "__main__":
    cli.define_config(required=False)
    flags.declare_key_flag("config")
    flags.DEFINE_list("what", None, f"what is timed: {','.join(WHAT)}; by default train,denoise, or with --report all")
    flags.DEFINE_enum("against", None, ["diffusers"], "what is timed beside it: PyTorch on diffusers' DiT")
    flags.DEFINE_bool("report", False, "time the set of which benchmarks.md is made, beside diffusers")
    cli.define_path("out", None, "a folder for the report and its parts")
    flags.DEFINE_integer("rounds", 5, "timings of each; 3 or 1 at most of what takes long and has no target", lower_bound=1)
    flags.DEFINE_float("seconds", 1.0, "how long a timing is at least: so many calls", lower_bound=0)
    flags.DEFINE_integer("images", 4, "how many images are denoised at once", lower_bound=1)
    cli.define_path("vae", None, "for decode: a VAE's file or folder; by default noise of the published shape")
    cli.define_path("cache", None, "for data: a latent cache; by default one of noise is made, 256 px")
    cli.define_path("pictures", None, "for data: a folder of class folders; by default crops of photographs")
    flags.DEFINE_integer("num_latents", 8192, "for data: how many latents are made", lower_bound=512)
    cli.define_path("scratch", None, "for data and start: a folder for what is made; by default the system's temporary "
                        "one")
    flags.DEFINE_integer("samples", 50_000, "for evaluation: features of samples", lower_bound=4)
    flags.DEFINE_integer("references", 10_000, "for evaluation: features of the reference", lower_bound=4)
    flags.DEFINE_integer("width", 2048, "for evaluation: of the features", lower_bound=1)
    cli.parse()  # above the imports that take time

import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata

import jax

from dit_jax import autoencoder, config as configs
from dit_jax.config import UserError
from dit_jax.data import latents
from dit_jax.data.pictures import Folder
from dit_jax.diffusion.schedule import linear_schedule, respace
from dit_jax.logging import Progress, say
from dit_jax.models import vae
from dit_jax.timing import data, page
from dit_jax.timing.child import Child, ChildError
from dit_jax.runtime import ending, files
from dit_jax.runtime.files import write_aside

# What --report times: (what, model, images a call). The three training steps and the two denoising steps have targets.
REPORT = [("train", "DiT-S/2", 8), ("train", "DiT-B/4", 8), ("train", "DiT-S/8", 32), ("denoise", "DiT-S/2", 4),
          ("denoise", "DiT-XL/2", 1), ("sample", "DiT-S/2", 1), ("decode", "DiT-S/2", 4), ("start", "DiT-XL/2", 1),
          ("data", "DiT-S/2", 8), ("evaluation", "DiT-S/2", 8), ("scaling", "DiT-S/2", 4)]
OURS, THEIRS, START, DATA, EVALUATION = (f"dit_jax.timing.{module}" for module in (
    "ours", "theirs", "start", "data", "evaluation"))


@dataclass
class Part:
    """What is timed together. sides: {label: (module of the child, its spec)}, ours first. warm: whether a call or two
    go before the rounds. about: fields of the record."""
    name: str
    what: str
    model: str
    sides: dict
    rounds: int
    warm: bool = True
    about: dict = field(default_factory=dict)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it


def machine(packages=("jax", "jaxlib", "flax", "numpy", "scipy", "torch", "diffusers")):
    """The machine and the versions, plain values. Parts that differ here are not put on one page."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            text = f.read()
        cpu = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), cpu)
        # Virtual machines of one name differ in this, and by it in their matrix rate by 3 times.
        cpu += next((f" with {name}" for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in text), "")
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    versions = {name: installed.get(name) for name in packages}
    return {"cpu": cpu, "cores": cores(), "system": platform.platform(terse=True),
            "versions": {"python": platform.python_version(), **versions}}


def commit():
    """Of the code, as git has it, with -dirty where files were changed since; None where it has none."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=os.path.dirname(__file__), text=True,
                               capture_output=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def beside(config, spec):
    """The PyTorch side of what `spec` says, where --against asks for it: a dict to be merged into the sides."""
    model = config["model"]
    if not (flags.FLAGS.against or flags.FLAGS.report):
        return {}
    if model["block"] != "adaln_zero":
        raise UserError(f"model.block={model['block']}: --against=diffusers has adaln_zero alone")
    if not model["num_classes"]:
        raise UserError("model.num_classes=0: --against=diffusers has models with classes alone")
    return {page.DIFFUSERS: (THEIRS, {**spec, "threads": cores()})}


def label(config):
    """The model's name, with the fields that make it another one: it is then no model with targets."""
    name, model = config["model"]["name"], config["model"]
    if not name:
        return f"DiT {model['depth']}x{model['hidden_size']}/{model['patch_size']}"
    published = configs.resolve(configs.paper(name))
    changed = [f"{field.removeprefix('model.')}={value}" for field, _, value in configs.differences(published, config)
               if field.startswith("model.") and (field, value) != ("model.dtype", "float32")]  # in which targets are
    return f"{name} ({', '.join(changed)})" if changed else name


def model_parts(what, config, images):
    """The parts of a resolved config that run its network. images: that are denoised at once."""
    f, n, sample = flags.FLAGS, config["batch_size"], config["sample"]
    model = label(config)
    if what == "train":
        spec = {"what": what, "config": config}
        return [Part(f"train {model}, batch {n}", what, model, {
            page.OURS: (OURS, spec), **beside(config, spec)}, f.rounds)]
    if what == "scaling":
        return scaling_parts(config, model)
    if sample["cfg_scale"] == 1 or not config["model"]["num_classes"]:
        raise UserError(f"sample.cfg_scale={sample['cfg_scale']}, model.num_classes={config['model']['num_classes']}: "
                        f"--what={what} times guided steps, which need classes and a scale that is not 1")
    try:
        steps = len(respace(linear_schedule(config["diffusion"]["timesteps"]), sample["steps"]))
    except ValueError as e:
        raise UserError(f"config.sample: {e}") from None
    spec = {"what": "denoise", "config": config, "images": images}
    if what == "denoise":  # a step of DDPM on both sides
        spec["config"] = config | {"sample": sample | {"sampler": "ddpm"}}
        return [Part(f"denoise {model}, {images} guided", what, model, {
            page.OURS: (OURS, spec), **beside(config, spec)}, f.rounds)]
    sides = {page.OURS: (OURS, {**spec, "what": "sampler"}), page.BARE: (OURS, {**spec, "steps": steps})}
    return [Part(f"sample {model}, {images} guided, {steps} steps", what, model, sides, f.rounds, warm=False)]


def scaling_parts(config, model):
    """The training step at a quarter to twice the batch, the side in patches, and the depth, one at a time."""
    n, patch = config["batch_size"], config["model"]["patch_size"]
    grid, depth = config["model"]["input_size"] // patch, config["model"]["depth"]
    base, parts = {"batch": n, "tokens": grid**2, "depth": depth}, {}
    # First what all three lines of the plot share.
    for key, value, factors in (("batch", n, (1,)), ("batch", n, (0.25, 0.5, 2)), ("tokens", grid, (0.5, 0.75, 1.5)),
                                ("depth", depth, (0.25, 0.5, 2))):
        for v in sorted({max(1, round(value * factor)) for factor in factors}):
            at = base | {key: v**2 if key == "tokens" else v}
            side = patch * (v if key == "tokens" else grid)
            changed = config | {"batch_size": at["batch"],
                                "model": config["model"] | {"depth": at["depth"], "input_size": side}}
            spec = {"what": "train", "config": changed}
            parts[tuple(at.values())] = Part(
                f"scaling {model}, batch {at['batch']}, {at['tokens']} tokens, {at['depth']} blocks", "scaling", model,
                {page.OURS: (OURS, spec), **beside(config, spec)}, min(flags.FLAGS.rounds, 3),
                about={"at": at, "base": base})
    return list(parts.values())


def decode_parts(config):
    f = flags.FLAGS
    path = f.vae or ""
    codec = autoencoder.load(path) if path else None
    args, scale = (codec.args, codec.scale) if codec else (vae.PUBLISHED, autoencoder.SCALE)
    side = config["model"]["input_size"]
    size = side * 2 ** (len(args["block_out_channels"]) - 1)
    images, which = autoencoder.batch_size(size), f" by {os.path.basename(os.path.normpath(path))}" if path else ""
    args = {key: args[key] for key in ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")}
    return [Part(f"decode {images} of {size} px{which}", "decode", "VAE", {
        page.OURS: (OURS, {"what": "decode", "side": side, "path": path}),
        **beside(config, {"what": "decode", "images": images, "side": side, "args": args, "scale": scale})},
        f.rounds)]


def start_parts(config, scratch):
    """A first start, a second one, and PyTorch's. scratch: a folder for the weights."""
    spec = {"config": config, "folder": scratch, "threads": cores()}
    sides = {page.OURS: "fresh", page.AGAIN: "again"} | dict.fromkeys(beside(config, spec), "theirs")
    model = label(config)
    if config["model"]["block"] != "adaln_zero" or not config["model"]["num_classes"]:
        raise UserError(f"model.block={config['model']['block']}, model.num_classes={config['model']['num_classes']}: "
                        "--what=start takes guided steps of a file of the published format, which knows adaln_zero and classes")
    return [Part(f"start {model}", "start", model, {name: (START, {**spec, "side": side}) for name, side in sides.items()},
                 flags.FLAGS.rounds, warm=False)]


def data_parts(scratch):
    """The data path on --cache and --pictures, or on what is made in the folder `scratch`."""
    f = flags.FLAGS
    npy = os.path.join(scratch, "npy")
    for flag, path, source in (("cache", f.cache, latents.LatentCache), ("pictures", f.pictures, Folder)):
        try:
            count = 2 * data.BATCH if path is None else len(source(path))
        except ValueError as e:
            raise UserError(str(e)) from None
        if count < 2 * data.BATCH:
            raise UserError(f"--{flag}={path}: holds {count} examples, and two batches take {2 * data.BATCH}")
    say("data: making what is read")
    cache, folder = f.cache or os.path.join(scratch, "cache"), f.pictures or os.path.join(scratch, "pictures")
    if f.cache is None:
        data.make_cache(cache, f.num_latents)
    if f.pictures is None:
        data.make_pictures(folder, 4 * data.BATCH)
    torch = importlib.util.find_spec("torch") is not None
    shape = latents.LatentCache(cache).shape
    if torch:
        data.Npy.make(npy, f.num_latents, shape)
    else:
        say("PyTorch is not installed: no DataLoader to set beside (pip install -e '.[torch]')")
    parts = []
    for kind, path, other, rows in (
            ("latents", cache, npy, 8 * f.num_latents),  # about as long as the others take
            ("JPEG", folder, folder, 4 * data.BATCH)):
        spec = {"kind": kind, "path": other, "rows": rows}
        sides = {page.OURS: (DATA, {**spec, "path": path, "workers": None})}
        for workers in sorted({0, cores()}) if torch else ():
            sides[f"DataLoader, {workers} workers"] = DATA, {**spec, "workers": workers}
        what = f"{kind}, {'x'.join(map(str, shape))}" if kind == "latents" else kind
        parts.append(Part(f"data, {what}", "data", "", sides, f.rounds, warm=False))
    return parts


def evaluation_parts():
    f, parts = flags.FLAGS, []
    for metric, usual, n, rounds in (("FID", "np.cov, scipy's sqrtm", max(f.references, f.width + 1), 3),
                                     ("precision, recall", "scikit-learn's neighbours", f.references, 1)):
        spec = {"metric": metric, "shapes": [(f.samples, f.width), (n, f.width)]}
        sides = {label: (EVALUATION, {**spec, "usual": label != page.OURS}) for label in (page.OURS, usual)}
        parts.append(Part(f"{metric}, {f.samples:,d} samples" + ("" if metric == "FID" else f", {n:,d} references"),
                          "evaluation", "", sides, min(f.rounds, rounds), warm=False))
    return parts


def measure(part):
    """Times a part -> its record, plain values. Raises UserError."""
    sides, progress = {}, Progress(part.name, part.rounds * len(part.sides), "timings")
    progress.say(f"{part.name}: starts {' and '.join(part.sides)}")
    at_work = idle = 0.0
    with ExitStack() as stack:
        try:
            children, calls = {}, {}
            for label, (module, spec) in part.sides.items():
                children[label] = child = stack.enter_context(Child(module, spec, plain=module == THEIRS))
                if page.DIFFUSERS in part.sides and label == page.OURS and (
                        child.info.get("platform", "cpu") != "cpu" or child.info.get("dtype", "float32") != "float32"):
                    raise UserError(f"--against=diffusers compares float32 on CPU, and here JAX runs "
                                    f"{child.info['dtype']} on {child.info['device']}: set JAX_PLATFORMS=cpu and "
                                    "--config.model.dtype=float32")
                if part.warm:
                    child.ask()
                calls[label] = max(1, math.ceil(flags.FLAGS.seconds / child.ask()["seconds"])) if part.warm else 1
                sides[label] = {**child.info, "seconds": [], "rates": [], "calls": calls[label]}
            for i in range(part.rounds):
                for j, label in enumerate(list(children)[::-1 if i % 2 else 1]):
                    others = [child for name, child in children.items() if name != label]
                    before, start = [child.cpu_seconds() for child in others], time.perf_counter()
                    answer = children[label].ask(calls[label])
                    at_work += time.perf_counter() - start
                    after = [child.cpu_seconds() for child in others]
                    idle = None if None in after or idle is None else idle + sum(after) - sum(before)
                    sides[label]["seconds"].append(answer["seconds"])
                    sides[label]["rates"].append(answer["rate"])
                    sides[label] |= {key: answer[key] for key in ("memory", "value", "phases") if key in answer}
                    progress.update(i * len(children) + j + 1)
            if part.what in ("train", "denoise", "decode"):
                sides[page.OURS]["profile"] = children[page.OURS].profile()
        except ChildError as e:
            raise UserError(f"{part.name}: {e}") from None
        finally:
            progress.close()
    work = {key: sides[page.OURS].pop(key, None) for key in ("images", "flop")}  # of a call, the same on all sides
    return {"name": part.name, "what": part.what, "model": part.model, **work, "sides": sides,
            "idle": None if idle is None else idle / at_work, "date": time.strftime("%Y-%m-%d"), "commit": commit(),
            "machine": machine(), "command": " ".join(["python -m dit_jax.benchmark", *sys.argv[1:]]), **part.about}


def load_parts(folder, here):
    """The records in OUT/parts, by WHAT's order. Raises UserError where one is of another machine."""
    parts = []
    for name in sorted(name for name in os.listdir(folder) if name.endswith(".json")):
        path = os.path.join(folder, name)
        try:
            with open(path) as f:
                part = json.load(f)
            order = WHAT.index(part["what"])
            differ = [f"{key} ({part['machine'][key]} there, {here[key]} here)" for key in here
                      if part["machine"][key] != here[key]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: is no part of a report: remove it, and time that part again") from None
        if differ:
            raise UserError(f"{path}: was timed elsewhere: {', '.join(differ)}; use another --out")
        parts.append((order, name, part))
    return [part for *_, part in sorted(parts, key=lambda p: p[:2])]


def write(parts, out):
    found, scaling = page.targets(parts), [part for part in parts if part["what"] == "scaling"]
    report = {"machine": machine(), "parts": parts, "targets": found}
    write_aside(os.path.join(out, "report.json"), (json.dumps(report, indent=1) + "\n").encode())
    if scaling:
        page.scaling_plot(scaling, os.path.join(out, "scaling.png"))
    write_aside(os.path.join(out, "benchmarks.md"),
                         page.page(parts, found, machine(), bool(scaling)).encode())
    say(f"{out}/benchmarks.md, report.json" + (" and scaling.png" if scaling else ""))


def chosen(what, scratch):
    """The parts that the flags ask for."""
    f = flags.FLAGS
    if f.report:
        todo = [(kind, configs.paper(model), n) for kind, model, n in REPORT if kind in what]
        for _, config, n in todo:
            config.batch_size = n
    else:
        config = f.config
        if config is None:
            config = configs.paper("DiT-S/2")
            config.batch_size = 8
        todo = [(kind, config, f.images) for kind in WHAT if kind in what]
    parts = []
    for kind, config, images in todo:
        if kind == "data":
            parts += data_parts(scratch)
        elif kind == "evaluation":
            parts += evaluation_parts()
        else:
            config = configs.resolve(config)
            parts += (decode_parts(config) if kind == "decode" else start_parts(config, scratch) if kind == "start" else
                      model_parts(kind, config, images))
    return parts


def carry_out(what, scratch):
    """Times what is asked for, and says it. scratch: an empty folder."""
    f, here, parts = flags.FLAGS, machine(), []
    folder = f.out and os.path.join(f.out, "parts")
    before = load_parts(folder, here) if f.out else []
    if f.out and not before and os.path.exists(os.path.join(f.out, "report.json")):
        raise UserError(f"--out={f.out}: holds a report and not the parts that it was made of, so that a new one would not have "
                        "them: use another --out")
    kept = {(p["model"], *p["base"].values()) for p in before if p["what"] == "scaling"}
    todo = chosen(what, scratch)
    if any(kept - {(part.model, *part.about["base"].values())} for part in todo if part.what == "scaling"):
        raise UserError(f"--out={f.out}: its scaling is of another config, and the plot is of one: use another --out")
    for part in todo:
        parts.append(measure(part))
        if f.out:
            name = re.sub(r"[^A-Za-z0-9]+", "-", part.name) + ".json"
            write_aside(os.path.join(folder, name), (json.dumps(parts[-1], indent=1) + "\n").encode())
    if f.out:
        parts = load_parts(folder, here)
        if not parts:
            raise UserError(f"--out={f.out}: there are no parts to make a page of")
    say(f"\n{here['cores']} cores of {here['cpu']}\n\n{page.results(parts)}")
    if found := page.targets(parts):
        say(f"\n{page.target_table(found)}\n")
    for more in filter(None, (page.phases(parts), page.profiles(parts))):
        say(f"\n{more}\n")
    if f.out:
        write(parts, f.out)


def main():
    f = flags.FLAGS
    ending.raise_on_signals()
    jax.config.update("jax_platforms", "cpu")  # of this process: a TPU belongs to one, and that is to be a child
    if not math.isfinite(f.seconds):
        raise UserError(f"--seconds={f.seconds}: how long a timing is at least, a number of seconds")
    if f.scratch is not None:
        cli.make_workdir(f.scratch, "scratch")
    what = (WHAT if f.report else ("train", "denoise")) if f.what is None else f.what
    for kind in what:
        if kind not in WHAT:
            raise UserError(f"--what={kind}: unknown; one or more of {','.join(WHAT)}")
    if f.report and f.config is not None:
        raise UserError("--report has its own configs: leave --config out")
    if not what and not f.out:
        raise UserError("--what is empty: name what is to be timed, or with --out the report to make anew")
    if f.report or f.against:
        for package in ("torch", "diffusers"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"{'--report' if f.report else '--against'} needs {package}: pip install -e "
                                "'.[benchmark]'")
    with ExitStack() as held:
        if f.out is not None:
            cli.make_workdir(f.out, "out")  # which refuses an empty name
            cli.make_workdir(os.path.join(f.out, "parts"), "out")
            held.enter_context(files.hold(f.out, "out"))
        carry_out(what, held.enter_context(tempfile.TemporaryDirectory(dir=f.scratch)))


if __name__ == "__main__":
    cli.run(main)
