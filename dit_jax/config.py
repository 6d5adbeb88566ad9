"""Every field of a config, its default (the paper's recipe) and its check.

A config is plain data: a file of configs/ starts from `paper()` and changes what its run changes. Commands read it
and hand plain arguments down; nothing below them sees one.
"""

import difflib
import functools
import math

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dit_jax.runtime import files
from dit_jax.runtime.errors import UserError


def paper(model="DiT-XL/2"):
    """The paper's run of `model` (section 4): 256 px, 400 K steps."""
    c = ConfigDict()
    c.seed = 0
    c.steps = 400_000
    c.batch_size = 256  # global, over all devices and hosts

    c.model = ConfigDict()
    c.model.name = model  # gives the four fields below that are left unset
    c.model.patch_size = placeholder(int)
    c.model.depth = placeholder(int)
    c.model.hidden_size = placeholder(int)
    c.model.num_heads = placeholder(int)
    c.model.block = "adaln_zero"  # or adaln, cross_attention, in_context
    c.model.input_size = 32  # of the latents (256 px / 8), or of the pictures
    c.model.in_channels = 4
    c.model.num_classes = 1000  # 0: unconditional, labels are ignored: every example is of the null class
    c.model.dtype = "auto"  # compute: bfloat16 on TPU, float32 elsewhere; or say which
    c.model.scan = placeholder(bool)  # the blocks as one loop, or unrolled; unset: dit_jax/layout.py decides
    c.model.remat = "auto"  # or none, dots, full: what the backward pass recomputes

    c.init = ConfigDict()  # what a new run starts from; one that has checkpoints goes on from them
    c.init.weights = ""  # a .pt or .npz file of the published format, or another run's workdir; empty: none
    c.init.which = "ema"  # or raw: of a run, or of the published code's training checkpoint

    c.diffusion = ConfigDict()
    c.diffusion.timesteps = 1000
    c.diffusion.label_dropout = 0.1  # 0: no null class, and no guidance; of no effect where num_classes is 0

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-4  # constant, no warmup
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.ema_decay = 0.9999  # from the initial weights on

    c.data = ConfigDict()
    c.data.source = "latents"  # or folder, tfds, arrays, digits, mnist, synthetic: see dit_jax/data/sources.py
    c.data.path = ""  # the cache that `encode` made; the folder; the data_dir of tfds
    c.data.name = ""  # of tfds: the data set, as in imagenet2012
    c.data.split = "train"  # of tfds
    c.data.flip = True  # horizontally, every other time
    c.data.max_skipped = 100  # unreadable pictures of a folder or of tfds, replaced by the next and named, before the end

    c.vae = ConfigDict()  # turns latents into pictures for the grids, and pictures of folder and tfds into latents
    c.vae.path = ""  # a file, a folder, or a published name (dit_jax/autoencoder.py); empty: none

    c.mesh = ConfigDict()  # devices along each axis; one may be -1: what is left. Unset: dit_jax/layout.py decides
    c.mesh.data = -1
    c.mesh.fsdp = placeholder(int)
    c.mesh.tensor = placeholder(int)

    c.log_every = 100
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10_000
    c.checkpoint.keep = 3  # newest; 0 keeps all
    c.checkpoint.keep_every = 50_000  # and, for good, those of such steps; 0: none

    c.sample = ConfigDict()  # the grids drawn during training, with the EMA weights
    c.sample.every = 50_000  # 0: none
    c.sample.per_class = 4
    c.sample.classes = 8  # the first so many
    c.sample.cfg_scale = 4.0
    c.sample.cfg_channels = 3  # guided channels of epsilon, as published; 0: all
    c.sample.sampler = "ddpm"  # or ddim
    c.sample.steps = "250"
    c.sample.eta = 0.0  # of ddim

    c.eval = ConfigDict()  # FID on few samples during training, with the EMA weights, by sample's sampler
    c.eval.every = 0  # steps, and at the end; 0: none
    c.eval.num = 5_000  # all classes in turn
    c.eval.reference = ""  # an .npz or a folder of PNGs, as for dit_jax.evaluate
    c.eval.features = "inception"  # or efflite0, for FD-EffLite0, which is no FID
    c.eval.inception = ""  # the weights of InceptionV3
    c.eval.cfg_scale = 1.0
    c.eval.batch_size = 256  # images at a time, over all devices

    c.judge = ConfigDict()  # the closing measurement, on the embedded data
    c.judge.samples = 0  # 0: none
    return c


# What a checkpoint's arrays, or the sameness of a resumed run, hang on. Everything else may change on resume.
FIXED = ("seed", "batch_size", "model.patch_size", "model.depth", "model.hidden_size", "model.num_heads",
         "model.block", "model.input_size", "model.in_channels", "model.num_classes", "diffusion.timesteps",
         "diffusion.label_dropout", "data.source", "data.flip")


DTYPES = ("auto", "float32", "bfloat16")
PATHS = ("init.weights", "data.path", "vae.path", "eval.reference", "eval.inception")


def _flatten(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, (dict, ConfigDict)):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def _known_fields():
    return [name for name, _ in _flatten(paper())]


def unknown_field(field):
    """None where `field` ("model.depth") exists, else what to say."""
    known = _known_fields()
    if field in known:
        return None
    near = difflib.get_close_matches(field, known, n=3) or [name for name in known if name.endswith("." + field)]
    hint = f"did you mean {' or '.join(near)}?" if near else "dit_jax/config.py lists them"
    return f"unknown config field {field!r}: {hint}"


def resolve(config):
    """The config as a plain nested dict with every field set, and checked. Raises UserError naming the field."""
    # Not above: a config file is read before --help is answered, and JAX takes its time.
    from dit_jax.diffusion.guidance import MAX_SCALE
    from dit_jax.models.blocks import BLOCKS
    from dit_jax.models.dit import MODELS, REMAT, model_args

    config = config.to_dict()
    for name, _ in _flatten(config):
        if problem := unknown_field(name):
            raise UserError(problem)
    given = dict(_flatten(config))
    for name in _known_fields():
        if name not in given:
            raise UserError(f"config field {name} is missing: start from dit_jax.config.paper()")
    model = config["model"]
    if model["name"]:
        if model["name"] not in MODELS:
            raise UserError(f"model.name: unknown model {model['name']!r}: one of {', '.join(MODELS)}")
        for key, value in model_args(model["name"]).items():
            if model[key] is None:
                model[key] = value

    for name in PATHS:
        *parents, leaf = name.split(".")
        section = functools.reduce(dict.__getitem__, parents, config)
        try:
            section[leaf] = files.user_path(section[leaf])
        except ValueError as e:
            raise UserError(f"{name}={section[leaf]}: {e}") from None

    values = dict(_flatten(config))

    def check(field, ok, must):
        value = values[field]
        try:
            good = ok(value)
        except TypeError:
            good = False
        if not good:
            raise UserError(f"{field}={value!r}: must be {must}")

    for field in ("steps", "batch_size", "log_every", "checkpoint.every", "model.patch_size", "model.depth",
                  "model.hidden_size", "model.num_heads", "model.input_size", "model.in_channels",
                  "sample.per_class", "sample.classes", "eval.batch_size"):
        check(field, lambda v: v >= 1, "at least 1")
    for field in ("seed", "model.num_classes", "checkpoint.keep", "checkpoint.keep_every", "sample.every",
                  "sample.cfg_channels", "eval.every", "optimizer.weight_decay", "data.max_skipped"):
        check(field, lambda v: 0 <= v < math.inf, "0 or more")
    for field in ("optimizer.learning_rate", "optimizer.eps"):
        check(field, lambda v: 0 < v < math.inf, "positive")
    for field, value in values.items():
        if isinstance(value, float):
            check(field, lambda v: abs(v) < 3.4e38, "a number of float32")
    check("seed", lambda v: v < 2**32, "below 2**32")
    check("judge.samples", lambda v: v == 0 or v >= 2, "0, or at least 2")
    check("sample.eta", lambda v: 0 <= v <= 1, "between 0 and 1")
    for field in ("sample.cfg_scale", "eval.cfg_scale"):
        check(field, lambda v: 0 <= v <= MAX_SCALE, f"between 0 and {MAX_SCALE}")
    for field in ("optimizer.b1", "optimizer.b2", "ema_decay", "diffusion.label_dropout"):
        check(field, lambda v: 0 <= v < 1, "in [0, 1)")
    check("diffusion.timesteps", lambda v: 20 < v <= 1_000_000, "more than 20, and a million at most")
    check("model.block", BLOCKS.__contains__, f"one of {', '.join(BLOCKS)}")
    check("model.remat", ("auto", *REMAT).__contains__, f"one of auto, {', '.join(REMAT)}")
    check("model.dtype", DTYPES.__contains__, f"one of {', '.join(DTYPES)}")
    check("sample.sampler", ("ddpm", "ddim").__contains__, "ddpm or ddim")
    check("eval.features", ("inception", "efflite0").__contains__, "inception or efflite0")
    check("eval.num", lambda v: v >= 4, "at least 4")
    if config["eval"]["every"]:
        check("eval.reference", bool, "the .npz to compare with, or a folder of PNGs; or set eval.every=0")
        if config["eval"]["features"] == "inception":
            check("eval.inception", bool, "the file of InceptionV3's weights; or set eval.features=efflite0, for "
                  "FD-EffLite0, which is no FID")
    check("init.which", ("ema", "raw").__contains__, "ema or raw")
    if model["input_size"] % model["patch_size"]:
        raise UserError(f"model.patch_size={model['patch_size']} does not divide "
                        f"model.input_size={model['input_size']}")
    if model["hidden_size"] % model["num_heads"]:
        raise UserError(f"model.num_heads={model['num_heads']} does not divide "
                        f"model.hidden_size={model['hidden_size']}")
    if config["judge"]["samples"] and not model["num_classes"]:
        raise UserError(f"judge.samples={config['judge']['samples']}: the judge looks for the class asked for, and "
                        "model.num_classes=0 has none; set judge.samples=0")
    for field, used in (("sample", config["sample"]["every"] or config["judge"]["samples"]),
                        ("eval", config["eval"]["every"])):
        scale = config[field]["cfg_scale"]
        if used and scale != 1 and not model["num_classes"]:
            raise UserError(f"{field}.cfg_scale={scale}: guidance needs classes, and model.num_classes=0 has none; set "
                            f"{field}.cfg_scale=1")
        if used and scale != 1 and not config["diffusion"]["label_dropout"]:
            raise UserError(f"{field}.cfg_scale={scale}: guidance needs a null class, which diffusion.label_dropout=0 "
                            f"does not train; set {field}.cfg_scale=1")
    return config


def dit_args(config):
    """The arguments of models.dit.DiT of a config that layout.settle has settled."""
    from jax.numpy import dtype

    fields = ("patch_size", "depth", "hidden_size", "num_heads", "block", "input_size", "in_channels",
              "num_classes", "scan", "remat")
    return dict({field: config["model"][field] for field in fields}, dtype=dtype(config["model"]["dtype"]),
                null_class=config["diffusion"]["label_dropout"] > 0 or config["model"]["num_classes"] == 0)


def stored_problem(config):
    """What is wrong with a resolved config that was read from a file, or None. Fields that are newer than the file may be
    missing, but for those that cannot change."""
    if not isinstance(config, dict):
        return "no config"
    given, checked = dict(_flatten(config)), paper()
    for field in (*FIXED, "model.dtype", "model.scan", "model.remat", "mesh.data", "mesh.fsdp", "mesh.tensor"):
        if field not in given:
            return f"no config.{field}"
    for section, default in checked.items():
        if isinstance(default, ConfigDict) and not isinstance(config.get(section, {}), dict):
            return f"config.{section}={config[section]!r:.80}, no section"
    try:
        checked.update_from_flattened_dict({field: given[field] for field in given if field in _known_fields()})
        resolve(checked)
    except Exception as e:  # what does not fit is anything
        return f"a config that does not hold ({str(e).partition(chr(10))[0]:.150})"
    return None


def differences(old, new):
    """(field, old, new) of every field on which two resolved configs differ."""
    old, new = dict(_flatten(old)), dict(_flatten(new))
    return [(field, old.get(field), new.get(field)) for field in sorted({*old, *new})
            if old.get(field) != new.get(field)]
