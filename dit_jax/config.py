"""Every field of a config, with its default (the paper's recipe) and its check.

A config is plain data: a file of configs/ starts from `paper()` and changes the fields of its run. Commands read it and
pass plain arguments on; the modules below them see no config.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dit_jax.runtime import files
from dit_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from dit_jax.diffusion.objectives import Objective


def paper(model: str = "DiT-XL/2") -> ConfigDict:
    """Returns the config of the paper's run of `model` (section 4): 256 px, 400 K steps."""
    c = ConfigDict()
    c.seed = 0  # of the initial weights, the data order, timesteps, noise and label drops
    c.steps = 400_000
    c.batch_size = 256  # global, over all devices and hosts
    c.accumulate = placeholder(int)  # parts of a batch that share a step, one after another; unset: layout.py decides
    c.objective = "ddpm"  # the paper's; or "flow" (SiT), "meanflow": see dit_jax/diffusion/objectives.py

    c.model = ConfigDict()
    c.model.name = model  # as in "DiT-B/4"; sets those of the next four fields that are unset; "": none
    c.model.patch_size = placeholder(int)
    c.model.depth = placeholder(int)
    c.model.hidden_size = placeholder(int)
    c.model.num_heads = placeholder(int)
    c.model.block = "adaln_zero"  # or "adaln", "cross_attention", "in_context"
    c.model.input_size = 32  # height and width of the latents (256 px / 8) or pictures
    c.model.in_channels = 4
    c.model.learn_sigma = placeholder(bool)  # whether the head has channels of the variance; unset: if needed
    # 0: unconditional; labels are ignored, and every example is of the null class. -1: as many as the data name.
    c.model.num_classes = 1000
    c.model.dtype = "auto"  # compute dtype: "float32", "bfloat16"; "auto": bfloat16 where the chip has it, not on CPU
    c.model.scan = placeholder(bool)  # whether the blocks are one loop; unset: dit_jax/parallel/layout.py decides
    c.model.remat = "auto"  # what the backward pass recomputes: "none", "dots", "full"; "auto": layout.py decides
    c.model.attention = (
        "auto"  # what runs it: "xla", "pallas", "cudnn" (models/attention.py); "auto": layout.py decides
    )

    c.init = ConfigDict()  # the weights that a new run starts from; a run with checkpoints resumes from them instead
    c.init.weights = ""  # a workdir, a .pt, .npz or .safetensors file, a diffusers folder or a published name; "": none
    c.init.which = "ema"  # or "raw", as in a training checkpoint of the published code, or "std0.1": see c.average

    c.diffusion = ConfigDict()
    c.diffusion.timesteps = 1000  # of ddpm
    c.diffusion.min_snr = 0.0  # of ddpm: gamma of the Min-SNR weight of the squared error, as in 5; 0: none
    c.diffusion.label_dropout = 0.1  # 0: no null class, so no guidance; ignored if num_classes is 0

    c.flow = ConfigDict()  # the objective "flow": dit_jax/diffusion/flow.py
    c.flow.path = "linear"  # or "gvp", "vp"
    c.flow.prediction = "velocity"  # or "noise", "score", "x_0": the data
    c.flow.weight = "none"  # of noise and score only: or "velocity", "likelihood"
    c.flow.time = "uniform"  # how t is drawn; or "logit_normal"
    c.flow.time_mean = 0.0  # of logit_normal, before the sigmoid
    c.flow.time_std = 1.0
    c.flow.time_low = 0.0  # only times between these two are drawn
    c.flow.time_high = 1.0
    c.flow.direction = False  # add LightningDiT's cosine loss

    c.meanflow = ConfigDict()  # the objective "meanflow": dit_jax/diffusion/meanflow.py
    c.meanflow.time = "logit_normal"  # how t and r are drawn; or "uniform"
    c.meanflow.time_mean = -0.4
    c.meanflow.time_std = 1.0
    c.meanflow.instantaneous = 0.75  # the share of the examples with r = t
    c.meanflow.omega = 1.0  # guidance that is trained in; omega 1 with kappa 0: none
    c.meanflow.kappa = 0.5
    c.meanflow.t_start = 0.0  # guided between these times
    c.meanflow.t_end = 1.0
    c.meanflow.norm_p = 1.0  # power of the adaptive weight
    c.meanflow.norm_eps = 0.01

    c.optimizer = ConfigDict()  # dit_jax/training/optimizer.py
    c.optimizer.name = "adamw"  # or "muon": Muon for the kernels of the blocks, AdamW for the rest
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup = 0  # steps over which the rate rises linearly
    c.optimizer.schedule = "constant"  # or "cosine": the rate falls from the end of warmup to 0 at config.steps
    c.optimizer.clip = 0.0  # the largest norm of the gradient of all parameters; a longer one is scaled to it; 0: none
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.ema_decay = 0.9999  # the EMA starts as a copy of the initial weights

    c.average = ConfigDict()  # averages whose width is chosen after training: dit_jax/average.py
    c.average.every = 0  # steps between snapshots, and at the end; 0: none, and no averages are tracked
    c.average.narrow = 0.05  # widths of the two that are tracked, as shares of the length of training
    c.average.wide = 0.1

    c.data = ConfigDict()
    c.data.source = "latents"  # or digits, mnist, synthetic, arrays, folder, tfds: see dit_jax/data/sources.py
    c.data.path = ""  # latents: the cache that `encode` made; folder, arrays: the folder; tfds: the data_dir
    c.data.name = ""  # tfds: the data set, as in "imagenet2012"
    c.data.split = "train"  # tfds: the split
    c.data.flip = True  # mirror each example horizontally with probability 1/2
    # folder, tfds: this many unreadable pictures are named and replaced by the next; one more ends the run.
    c.data.max_skipped = 100

    c.vae = ConfigDict()  # decodes latents for sample grids, and encodes the pictures of folder and tfds
    c.vae.path = ""  # a file, a folder, or a published name such as "stabilityai/sd-vae-ft-ema"; "": none

    c.mesh = ConfigDict()  # devices along each axis; -1 on one axis: the rest; unset: layout.py decides
    c.mesh.data = -1
    c.mesh.fsdp = placeholder(int)  # devices that share the weights and the optimizer state
    c.mesh.tensor = placeholder(int)  # devices that share each layer

    c.log_every = 100  # steps
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10_000  # steps
    c.checkpoint.keep = 3  # the newest ones; 0: all
    c.checkpoint.keep_every = 50_000  # also keep, for good, those at multiples of this step; 0: none

    c.sample = ConfigDict()  # the sample grids during training, with the EMA weights
    c.sample.every = 50_000  # steps; 0: none
    c.sample.per_class = 4
    c.sample.classes = 8  # the first ones
    c.sample.cfg_scale = 4.0  # classifier-free guidance; 1: none
    c.sample.cfg_channels = 3  # how many channels of epsilon are guided; 3 as published; 0: all
    c.sample.cfg_interval = ""  # "LOW,HIGH": guided only at times between these, of the objective; "": always
    c.sample.sampler = "ddpm"  # see dit_jax/diffusion/catalog.py; "NAME:option=value,.." sets its options
    c.sample.steps = "250"  # evaluations of the network; for ddpm and ddim also "a,b,c" or "ddimN"
    c.sample.eta = 0.0  # ddim: 0 is deterministic, 1 as noisy as ddpm

    c.eval = ConfigDict()  # FID on few samples during training, with the EMA weights and the sampler of c.sample
    c.eval.every = 0  # steps, and at the end; 0: none
    c.eval.num = 5_000  # samples, of all classes in turn
    c.eval.reference = ""  # an .npz or a folder of PNGs, as for dit_jax.evaluate
    c.eval.features = "inception"  # or "efflite0": FD-EffLite0, which is no FID
    c.eval.inception = ""  # the file of InceptionV3's weights
    c.eval.cfg_scale = 1.0
    c.eval.batch_size = 256  # images at a time, over all devices

    c.judge = ConfigDict()  # the closing measurement of a run on digits or MNIST, by a classifier of the real pictures
    c.judge.samples = 0  # 0: none
    return c


# The fields that must not change when a run resumes: the checkpoint's arrays or the sameness of the run depend on them.
FIXED = (
    "seed",
    "batch_size",
    "model.patch_size",
    "model.depth",
    "model.hidden_size",
    "model.num_heads",
    "model.block",
    "model.input_size",
    "model.in_channels",
    "model.num_classes",
    "diffusion.timesteps",
    "diffusion.label_dropout",
    "data.source",
    "data.flip",
)
# Likewise: fields and sections that older checkpoints lack. There they had their default.
FIXED_SINCE = ("objective", "model.learn_sigma", "diffusion.min_snr", "flow", "meanflow", "average", "optimizer.name")


def is_fixed(field: str, old: Any, new: Any) -> bool:
    """Whether a field must not change from `old` to `new` when a run resumes."""
    if field == "average.every":  # how often is free, but averages that were not tracked cannot be had later
        return bool(old) != bool(new)
    return field in FIXED or field in FIXED_SINCE or field.partition(".")[0] in FIXED_SINCE


SHARES = ("flow.time_low", "flow.time_high", "meanflow.instantaneous", "meanflow.t_start", "meanflow.t_end")
PATHS = ("init.weights", "data.path", "vae.path", "eval.reference", "eval.inception")
AT_LEAST_ONE = (
    "steps",
    "batch_size",
    "log_every",
    "checkpoint.every",
    "model.patch_size",
    "model.depth",
    "model.hidden_size",
    "model.num_heads",
    "model.input_size",
    "model.in_channels",
    "sample.per_class",
    "sample.classes",
    "eval.batch_size",
)
NOT_NEGATIVE = (
    "seed",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "sample.every",
    "sample.cfg_channels",
    "eval.every",
    "average.every",
    "optimizer.weight_decay",
    "optimizer.warmup",
    "optimizer.clip",
    "data.max_skipped",
)


# The least and the largest width of an average; the uniform average of all steps has 12**-0.5.
AVERAGE_STD = (0.001, 0.288)
WHICH = "ema or raw, or an average of a run by its width, as in std0.1"


def average_name(std: float) -> str:
    """The name of the average of this width, as in "std0.1"."""
    return f"std{float(std)}"


def average_std(name: str) -> float:
    """The width of the average of this name."""
    return float(name.removeprefix("std"))


def average_names(config: dict[str, Any]) -> tuple[str, ...]:
    """The names of the averages that a run tracks; none if it tracks none."""
    section = config.get("average", {})
    return (average_name(section["narrow"]), average_name(section["wide"])) if section.get("every") else ()


def is_which(which: Any) -> bool:
    """Whether this is "ema", "raw", or the name of an average."""
    if which in ("ema", "raw"):
        return True
    named = isinstance(which, str) and re.fullmatch(r"std0?\.[0-9]{1,20}", which)
    return bool(named) and AVERAGE_STD[0] <= average_std(which) <= AVERAGE_STD[1]


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("model.depth", value) of each field."""
    for key, value in tree.items():
        if isinstance(value, (dict, ConfigDict)):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def _known_fields():
    return [name for name, _ in _flatten(paper())]


def unknown_field(field: str) -> str | None:
    """Returns None if the field exists ("model.depth"), otherwise the error's text."""
    known = _known_fields()
    if field in known:
        return None
    near = difflib.get_close_matches(field, known, n=3) or [name for name in known if name.endswith("." + field)]
    hint = f"did you mean {' or '.join(near)}?" if near else "dit_jax/config.py lists them"
    return f"unknown config field {field!r}: {hint}"


def resolve(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as a plain nested dict, with the model's fields set, paths expanded, and every field checked.

    What is "auto" or unset for the devices stays so, for layout.resolve_auto. Raises UserError naming the field.
    """
    resolved = config.to_dict()
    _check_names(resolved)
    _set_model_fields(resolved["model"])
    _expand_paths(resolved)
    _check_values(dict(_flatten(resolved)))
    _check_combinations(resolved)
    return resolved


def _check_names(config):
    given = dict(_flatten(config))
    for name in given:
        if problem := unknown_field(name):
            raise UserError(problem)
    for name in _known_fields():
        if name not in given:
            raise UserError(f"config field {name} is missing: start from dit_jax.config.paper()")


def _set_model_fields(model):
    """Sets the unset fields that the model's name determines."""
    # Not at the top: a config file is read before --help is answered, and JAX takes long to import.
    from dit_jax.models.dit import MODELS, model_args

    if model["name"]:
        if model["name"] not in MODELS:
            raise UserError(f"model.name: unknown model {model['name']!r}: one of {', '.join(MODELS)}")
        for key, value in model_args(model["name"]).items():
            if model[key] is None:
                model[key] = value


def _expand_paths(config):
    for name in PATHS:
        section, leaf = name.split(".")
        try:
            config[section][leaf] = files.user_path(config[section][leaf])
        except ValueError as e:
            raise UserError(f"{name}={config[section][leaf]}: {e}") from None


def _checks(values: dict[str, Any]) -> list[tuple[tuple[str, ...], Callable[[Any], bool], str]]:
    """Returns [(fields, whether a value is good, what it must be)], in the order in which they are checked.

    values: {field: value} of all fields.
    """
    from dit_jax.diffusion.catalog import SAMPLERS  # not at the top, as above
    from dit_jax.diffusion.flow import FLOW_PREDICTIONS, WEIGHTS
    from dit_jax.diffusion.guidance import MAX_SCALE
    from dit_jax.diffusion.levels import PATHS
    from dit_jax.diffusion.objectives import OBJECTIVES
    from dit_jax.models.attention import ATTENTION
    from dit_jax.models.blocks import BLOCKS
    from dit_jax.models.dit import REMAT

    def one_of(*choices):
        return choices.__contains__

    low, high = AVERAGE_STD
    floats = tuple(field for field, value in values.items() if isinstance(value, float))
    reference = ("eval.reference",) if values["eval.every"] else ()
    inception = ("eval.inception",) if values["eval.every"] and values["eval.features"] == "inception" else ()
    weights = "the file of InceptionV3's weights; or set eval.features=efflite0, for FD-EffLite0, which is no FID"
    return [
        (AT_LEAST_ONE, lambda v: v >= 1, "at least 1"),
        (NOT_NEGATIVE, lambda v: 0 <= v < math.inf, "0 or more"),
        (("model.num_classes",), lambda v: -1 <= v < math.inf, "0 or more, or -1"),
        (("accumulate",), lambda v: v is None or v >= 1, "at least 1, or unset"),
        (("optimizer.learning_rate", "optimizer.eps"), lambda v: 0 < v < math.inf, "positive"),
        (("optimizer.name",), one_of("adamw", "muon"), "adamw or muon"),
        (("optimizer.schedule",), one_of("constant", "cosine"), "constant or cosine"),
        (floats, lambda v: abs(v) < 3.4e38, "a number of float32"),
        (("seed",), lambda v: v < 2**32, "below 2**32"),
        (("steps", "optimizer.warmup"), lambda v: v < 2**31, "below 2**31"),
        (("judge.samples",), lambda v: v == 0 or v >= 2, "0, or at least 2"),
        (("sample.eta",), lambda v: 0 <= v <= 1, "between 0 and 1"),
        (("sample.cfg_scale", "eval.cfg_scale"), lambda v: 0 <= v <= MAX_SCALE, f"between 0 and {MAX_SCALE}"),
        (("optimizer.b1", "optimizer.b2", "ema_decay", "diffusion.label_dropout"), lambda v: 0 <= v < 1, "in [0, 1)"),
        (("diffusion.timesteps",), lambda v: 20 < v <= 1_000_000, "more than 20, and a million at most"),
        (("sample.sampler",), lambda v: v.partition(":")[0] in SAMPLERS, f"one of {', '.join(SAMPLERS)}, with options"),
        (("objective",), one_of(*OBJECTIVES), f"one of {', '.join(OBJECTIVES)}"),
        (("diffusion.min_snr", "meanflow.norm_p"), lambda v: 0 <= v < math.inf, "0 or more"),
        (("flow.path",), one_of(*PATHS), f"one of {', '.join(PATHS)}"),
        (("flow.prediction",), one_of(*FLOW_PREDICTIONS), f"one of {', '.join(FLOW_PREDICTIONS)}"),
        (("flow.weight",), one_of(*WEIGHTS), f"one of {', '.join(WEIGHTS)}"),
        (("flow.time", "meanflow.time"), one_of("uniform", "logit_normal"), "uniform or logit_normal"),
        (("flow.time_std", "meanflow.time_std", "meanflow.norm_eps"), lambda v: 0 < v < math.inf, "positive"),
        (SHARES, lambda v: 0 <= v <= 1, "between 0 and 1"),
        (("model.block",), one_of(*BLOCKS), f"one of {', '.join(BLOCKS)}"),
        (("model.remat",), one_of("auto", *REMAT), f"one of auto, {', '.join(REMAT)}"),
        (("model.attention",), one_of("auto", *ATTENTION), f"one of auto, {', '.join(ATTENTION)}"),
        (("model.dtype",), one_of("auto", "float32", "bfloat16"), "one of auto, float32, bfloat16"),
        (("eval.features",), one_of("inception", "efflite0"), "inception or efflite0"),
        (("eval.num",), lambda v: v >= 4, "at least 4"),
        (reference, bool, "the .npz to compare with, or a folder of PNGs; or set eval.every=0"),
        (inception, bool, weights),
        (("init.which",), is_which, WHICH),
        (("average.narrow", "average.wide"), lambda v: low <= v <= high, f"between {low} and {high}"),
    ]


def _check_values(values):
    """Checks each field by itself."""
    for fields, is_good, must in _checks(values):
        for field in fields:
            try:
                good = is_good(values[field])
            except TypeError:
                good = False
            if not good:
                raise UserError(f"{field}={values[field]!r}: must be {must}")


def _check_combinations(config):
    """Checks the fields that must fit each other."""
    from dit_jax.diffusion.flow import Flow  # not at the top, as above

    model = config["model"]
    for divisor, size in (("patch_size", "input_size"), ("num_heads", "hidden_size")):
        if model[size] % model[divisor]:
            raise UserError(f"model.{divisor}={model[divisor]} does not divide model.{size}={model[size]}")
    optimizer = config["optimizer"]
    if optimizer["schedule"] == "cosine" and optimizer["warmup"] >= config["steps"]:
        raise UserError(
            f"optimizer.warmup={optimizer['warmup']}: must be less than steps={config['steps']}, where the cosine ends"
        )
    average = config["average"]
    if average["every"] and average["narrow"] >= average["wide"]:
        raise UserError(f"average.narrow={average['narrow']}: must be less than average.wide={average['wide']}")
    objective = objective_of(config)
    if objective.learn_sigma and model["learn_sigma"] is False:
        raise UserError(f"model.learn_sigma=False: objective={objective.name} trains the variance; leave it unset")
    f = config["flow"]
    if objective.name == "flow" and f["direction"] and f["prediction"] != "velocity":
        raise UserError(f"flow.direction=True: is for flow.prediction=velocity, not {f['prediction']}")
    if f["time_low"] >= f["time_high"]:
        raise UserError(f"flow.time_low={f['time_low']}: must be less than flow.time_high={f['time_high']}")
    if isinstance(objective, Flow) and objective.share_in_range() < 1e-4:
        raise UserError(
            f"flow.time_low={f['time_low']}, flow.time_high={f['time_high']}: hardly a time is drawn between them; "
            "widen the range"
        )
    m = config["meanflow"]
    guided = objective.name == "meanflow" and (m["omega"], m["kappa"]) != (1, 0)
    if guided and not (model["num_classes"] and config["diffusion"]["label_dropout"]):
        raise UserError(
            f"meanflow.omega={m['omega']}, kappa={m['kappa']}: guidance needs classes and label dropout; set omega=1 "
            "and kappa=0"
        )
    if m["t_start"] > m["t_end"]:
        raise UserError(f"meanflow.t_start={m['t_start']}: must not be above meanflow.t_end={m['t_end']}")
    if config["judge"]["samples"] and not model["num_classes"]:
        raise UserError(
            f"judge.samples={config['judge']['samples']}: the judge looks for the class asked for, and "
            "model.num_classes=0 has none; set judge.samples=0"
        )
    for section, used in (
        ("sample", config["sample"]["every"] or config["judge"]["samples"]),
        ("eval", config["eval"]["every"]),
    ):
        scale = config[section]["cfg_scale"]
        if used and scale != 1 and not model["num_classes"]:
            raise UserError(
                f"{section}.cfg_scale={scale}: guidance needs classes, and model.num_classes=0 has none; set "
                f"{section}.cfg_scale=1"
            )
        if used and scale != 1 and not config["diffusion"]["label_dropout"]:
            raise UserError(
                f"{section}.cfg_scale={scale}: guidance needs a null class, which diffusion.label_dropout=0 "
                f"does not train; set {section}.cfg_scale=1"
            )


def with_classes(config: dict[str, Any], class_names: Sequence[str] | None) -> dict[str, Any]:
    """Returns the config with model.num_classes=-1 replaced by the number of the data's classes.

    class_names: of the data, or None. Raises UserError if they are needed and the data have none.
    """
    if config["model"]["num_classes"] != -1:
        return config
    if class_names is None:
        raise UserError(f"model.num_classes=-1: data.source={config['data']['source']!r} names no classes; set it")
    return config | {"model": config["model"] | {"num_classes": len(class_names)}}


def dit_args(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of models.dit.DiT of a config that layout.resolve_auto has returned.

    Raises UserError if the number of classes is that of data which are not known here.
    """
    from jax.numpy import dtype

    model = config["model"]
    if model["num_classes"] == -1:
        raise UserError("model.num_classes=-1: is read from the data of a training run; set how many classes there are")
    fields = (
        "patch_size",
        "depth",
        "hidden_size",
        "num_heads",
        "block",
        "input_size",
        "in_channels",
        "num_classes",
        "scan",
        "remat",
        "attention",
    )
    from dit_jax.diffusion.objectives import OBJECTIVES

    objective = OBJECTIVES[config.get("objective", "ddpm")]
    learn_sigma = model.get("learn_sigma")
    return {field: model[field] for field in fields} | {
        "learn_sigma": objective.learn_sigma if learn_sigma is None else learn_sigma,
        "second_time": objective.second_time,
        "dtype": dtype(model["dtype"]),
        "null_class": config["diffusion"]["label_dropout"] > 0 or model["num_classes"] == 0,
    }


def objective_of(config: dict[str, Any]) -> "Objective":
    """The objective of a resolved config. One that is older than a field has the field's default."""
    from dit_jax.diffusion.objectives import DDPM, Flow, MeanFlow

    name = config.get("objective", "ddpm")
    if name == "ddpm":
        return DDPM(config["diffusion"]["timesteps"], config["diffusion"].get("min_snr", 0.0))
    return Flow(**config["flow"]) if name == "flow" else MeanFlow(**config["meanflow"])


def stored_problem(config: Any) -> str | None:
    """Returns what is wrong with a resolved config that was read from a file, or None.

    Fields that are newer than the file may be missing, except those that must not change.
    """
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
    except Exception as e:  # values of a damaged file raise anything
        return f"a config that does not hold ({str(e).partition(chr(10))[0]:.150})"
    return None


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (field, old, new) of every field on which two resolved configs differ.

    A field that is missing has its default.
    """
    defaults = dict(_flatten(paper().to_dict()))
    olds, news = (defaults | dict(_flatten(config)) for config in (old, new))
    return [(field, olds[field], news[field]) for field in sorted({*olds, *news}) if olds.get(field) != news.get(field)]
