"""What the commands share: flags, configs from files, and errors in one line.

A command imports this module first: from then on a signal ends it with one line. It defines and parses its flags above
its other imports, because --help and a wrong flag should not wait for JAX, which takes most of a second to import. So
this module does not import JAX before `run`.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dit_jax.runtime import ending, process

if ending.is_command():  # before the imports that take time
    process.before_imports()
    ending.catch_signals()

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from dit_jax.config import WHICH, is_which, unknown_field
from dit_jax.runtime import files
from dit_jax.runtime.errors import UserError, line_of

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dit_jax.sampling.model import Model, Samples

flags.disclaim_key_flags()  # --help lists the flags that are defined here under the command itself


def define_config(required: bool = True) -> None:
    """Defines the flags --config=FILE and --config.a.b=c."""
    config_flags.DEFINE_config_file("config", None, "a file of configs/; --config.a.b=c sets a field", lock_config=True)
    if required:
        flags.register_validator(
            "config", lambda c: c is not None, "is missing: name a file, e.g. --config=configs/digits.py"
        )


def define_hosts() -> None:
    """Defines the flags of hosts.join."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; for several hosts that are not a TPU slice")
    flags.DEFINE_integer(
        "process_count", None, "number of processes, one for each host; 1: only this host, also on a slice"
    )
    flags.DEFINE_integer("process_id", None, "number of this process, from 0")
    timeout_help = "seconds without a sign of life after which a host counts as lost"
    flags.DEFINE_float("host_timeout", 60, timeout_help, lower_bound=1, upper_bound=86_400)
    flags.register_validator("host_timeout", lambda seconds: seconds == seconds, "is not a number of seconds")


def define_which() -> None:
    """Defines the flag --which."""
    flags.DEFINE_string("which", "ema", f"the weights: {WHICH}, which dit_jax.average makes")
    flags.register_validator("which", is_which, f"must be {WHICH}")


def define_model() -> None:
    """Defines the flags of load_model."""
    define_path("workdir", None, "run directory")
    flags.DEFINE_integer("step", None, "the checkpoint of the run; by default the newest")
    weights_help = (
        "instead of --workdir: a .pt, .npz or .safetensors file of the published names, a diffusers folder, or a "
        "published name such as DiT-XL/2-256"
    )
    define_path("weights", None, weights_help)
    heads_help = "number of attention heads of --weights; needed if their width is not one of the paper's"
    flags.DEFINE_integer("num_heads", None, heads_help, lower_bound=1)
    table_help = "number of classes of --weights; needed if they have no null class: the rows of the label table"
    flags.DEFINE_integer("num_classes", None, table_help, lower_bound=1)
    define_objective()
    define_which()
    vae_help = (
        "the decoder of latents: a file, a folder, or a published name such as stabilityai/sd-vae-ft-ema; by default "
        "the run's; empty: none"
    )
    define_path("vae", None, vae_help)
    define_path("guide", None, "run directory of a second network, which guides instead of the null class")
    flags.DEFINE_integer("guide_step", None, "the checkpoint of --guide; by default the newest")


def define_samples(num: int, classes: str, cfg_scale: float) -> None:
    """Defines the flags of samples(), with these defaults of --num, --classes and --cfg_scale."""
    define_model()
    flags.DEFINE_integer("num", num, "number of images")
    classes_help = "balanced (all in turn), random, or class numbers or names as in 3,7 (in turn)"
    flags.DEFINE_string("classes", classes, classes_help)
    scale_help = f"scale of classifier-free guidance; 1: none; by default {cfg_scale:g}, and 1 for a MeanFlow network"
    flags.DEFINE_float("cfg_scale", None, scale_help)
    flags.DEFINE_integer("cfg_channels", 3, "how many channels are guided, the first ones; 0: all")
    interval_help = "LOW,HIGH: guide only steps at times between these, as the network sees them; by default all"
    flags.DEFINE_string("cfg_interval", "", interval_help)
    sampler_help = (
        "a name of dit_jax/diffusion/catalog.py with options, as in unipc or edm:churn=20; by default ddpm, heun "
        "for flow matching (dpmpp_2m where the data are predicted), meanflow for MeanFlow"
    )
    flags.DEFINE_string("sampler", None, sampler_help)
    steps_help = "evaluations of the network, for ddpm and ddim also a,b,c or ddimN; by default 250, for MeanFlow 1"
    flags.DEFINE_string("steps", None, steps_help)
    flags.DEFINE_float("eta", 0.0, "for ddim: 0 is deterministic, 1 as noisy as ddpm")
    flags.DEFINE_integer("seed", 0, "seed of noise and random classes", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("batch_size", 32, "images at a time, over all devices")
    flags.DEFINE_integer("fsdp", 1, "devices that share the weights")
    flags.DEFINE_integer("tensor", 1, "devices that share a layer")
    define_hosts()


def define_objective() -> None:
    """Defines the flag of weights.load.choose_objective."""
    help = (
        "what a file of --weights was trained for: ddpm, flow (also flow:path=gvp,prediction=noise) or meanflow; by "
        "default meanflow if it takes a second time, else ddpm"
    )
    flags.DEFINE_string("objective", None, help)


def load_model(mesh: "Mesh") -> "Model":
    """Returns the model that the flags of define_model name. Raises UserError naming the flag."""
    from dit_jax.sampling.model import Model
    from dit_jax.vae.files import load as load_vae
    from dit_jax.weights import load

    f = flags.FLAGS
    if (f.workdir is None) == (f.weights is None):
        raise UserError("give exactly one of --workdir and --weights")
    for name, path in (("workdir", f.workdir), ("guide", f.guide)):
        if path is not None and not path.strip():
            raise UserError(f"--{name} is empty: name a run's folder")
    if f.weights and f.step is not None:
        raise UserError("--step names a checkpoint of a run: give it with --workdir")
    if f.guide_step is not None and f.guide is None:
        raise UserError("--guide_step names a checkpoint of --guide: name that run as well")
    for name in ("num_heads", "num_classes", "objective"):
        if f[name].value is not None and not f.weights:
            raise UserError(f"--{name} is of a weights file: give it with --weights; a run's config names its own")
    if f.workdir is not None:
        loaded = load.from_run(f.workdir, mesh, f.which, f.step)
    else:
        source = load.open_source(f.weights, f.which)
        loaded = load.from_source(source, mesh, f.which, f.num_heads, f.num_classes, f.objective)
    vae = loaded.vae if f.vae is None else f.vae
    guide = None if f.guide is None else load.load_guide(f.guide, mesh, f.which, f.guide_step)
    return Model(loaded, mesh, load_vae(vae) if vae else None, guide)


def samples(cfg_scale: float) -> "Samples":
    """Returns the samples that the flags of define_samples ask for. Raises UserError naming the flag."""
    from dit_jax.parallel import sharding
    from dit_jax.sampling.model import Samples, check_batch, choose_labels, settings_of

    f = flags.FLAGS
    model = load_model(sharding.make_mesh(data=-1, fsdp=f.fsdp, tensor=f.tensor))
    check_batch(model.args, f.num, f.batch_size)
    scale = cfg_scale if f.cfg_scale is None and model.objective.name != "meanflow" else f.cfg_scale
    settings = settings_of(model.objective, f.seed, f.sampler, f.steps, f.eta, scale, f.cfg_channels, f.cfg_interval)
    model.generator(settings, min(f.batch_size, f.num))  # checks the settings before anything is written
    labels = choose_labels(f.classes, f.num, model.args["num_classes"], f.seed, model.class_names)
    return Samples(model, settings, f.classes, labels, f.batch_size)


def define_source() -> None:
    """Defines the flags of data.pictures.open_pictures."""
    flags.DEFINE_enum("source", "folder", ["folder", "tfds"], "a folder of class folders, or a tensorflow-datasets set")
    define_path("path", None, "the folder of class folders, or the data_dir of tensorflow-datasets")
    flags.DEFINE_string("name", None, "for tfds: the data set")
    flags.DEFINE_string("split", "train", "for tfds: the split")
    flags.DEFINE_integer("size", 256, "height and width of the pictures, in pixels", lower_bound=8, upper_bound=4096)
    flags.DEFINE_integer("max_skipped", 100, "how many unusable pictures may be left out", lower_bound=0)


def define_features() -> None:
    """Defines the flags of evaluation.features.load."""
    features_help = "the network: inception, of the paper's evaluator; efflite0, from a Python package, for FD-EffLite0"
    flags.DEFINE_enum("features", "inception", ["inception", "efflite0"], features_help)
    define_path("inception", None, "the weights of InceptionV3, pt_inception-2015-12-05-6726825d.pth")
    batch_help = "pictures that go through the network at once on each device"
    flags.DEFINE_integer("features_batch_size", 32, batch_help, lower_bound=1, upper_bound=4096)


class _Path(flags.ArgumentParser):
    def parse(self, text):
        return files.user_path(text)


def define_path(name: str, default: str | None, help: str, **settings: Any) -> None:
    """Defines a flag that names a file or folder. settings: of absl's flags.DEFINE."""
    flags.DEFINE(_Path(), name, default, help, serializer=flags.ArgumentSerializer(), **settings)


def _last_line(error):
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _installed_configs():
    """Returns the folder of the package's own configs: inside an installed package, or beside that of a checkout."""
    package = os.path.dirname(os.path.abspath(__file__))
    inside = os.path.join(package, "configs")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), "configs")


def _config_file(path):
    """Returns `path`, as in configs/sit.py:B/2, or the package's own config where only that exists.

    Raises UserError if there is neither.
    """
    name, colon, argument = path.partition(":")
    if os.path.isfile(name):
        return path
    folder, file = os.path.split(os.path.normpath(name))
    own = os.path.join(_installed_configs(), file)
    if folder == "configs" and os.path.isfile(own):
        print(f"--config={path}: no such file here; the package's own is used: {own}", flush=True)
        return own + colon + argument
    where = f"; the package's own are in {_installed_configs()}" if os.path.isdir(_installed_configs()) else ""
    raise UserError(f"--config={path}: no such file{where}")


def _parse_flags(argv):
    for arg in argv[1:]:
        if any("\ud800" <= c < "\ue000" for c in arg):
            raise UserError(f"{os.fsencode(arg).decode(errors='backslashreplace')}: is not UTF-8")
    path, argv = "FILE", list(argv)
    for i, (arg, following) in enumerate(zip(argv[1:], argv[2:] + [""]), 1):
        if arg == "--config" or arg.startswith("--config="):
            path = _config_file(arg.partition("=")[2] or following)
            if "=" in arg:
                argv[i] = f"--config={path}"
            else:
                argv[i + 1 : i + 2] = [path]
        elif arg.startswith(("--config.", "--noconfig.")):
            problem = unknown_field(arg.partition("config.")[2].partition("=")[0])
            if problem:
                raise UserError(problem)
            if not any(other == "--config" or other.startswith("--config=") for other in argv):
                raise UserError(f"{arg}: sets a field of a config: name it, e.g. --config=configs/digits.py")
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as e:
        raise UserError(_last_line(e)) from None
    except Exception as e:  # a config file can raise anything
        if isinstance(e, OSError) and e.filename is None:  # --help could not write to stdout
            raise
        raise UserError(f"--config={path}: cannot be read ({type(e).__name__}: {_last_line(e)})") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: values are given as --flag=value")
    config = flags.FLAGS.config if "config" in flags.FLAGS else None
    if config is not None and not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config() must return a ConfigDict")
    return rest


def _on_hosts(main):
    """Joins the other hosts, if the flags name any, calls main() and ends this process.

    An error on one host ends all of them.
    """
    from dit_jax.runtime import hosts  # imports JAX
    from dit_jax.runtime.progress import waiting

    process.cpu_without_accelerator()
    try:
        if "coordinator" in flags.FLAGS:
            f = flags.FLAGS
            hosts.join(f.coordinator, f.process_count, f.process_id, f.host_timeout)
        with waiting("still working"):
            status = main()
        hosts.finish()
        ending.finish(status or 0)
    except FloatingPointError:  # --debug_nans asks for the traceback
        traceback.print_exc()
        os._exit(1)
    except (Exception, KeyboardInterrupt) as e:
        hosts.fail(e)


def parse() -> None:
    """Parses the flags. --help ends the process; a wrong flag ends it with one line and status 1."""
    ending.catch_signals()
    app.define_help_flags()
    try:
        try:
            _parse_flags(sys.argv)
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # --help, or --help | head
        os._exit(0)
    except (UserError, OSError) as e:
        ending.end(1, line_of(e))


def run(main: Callable[[], int | None]) -> None:
    """Calls main(), which returns the exit status, and ends the process. An exception is one line and status 1."""
    process.quiet_libtpu()
    process.enough_threads("coordinator" in flags.FLAGS and flags.FLAGS.coordinator is not None)
    process.return_memory_after_compiling()
    process.quiet_logs()
    process.quiet_pillow()
    # File names may not be UTF-8.
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    with process.quiet_orbax_readers():  # also after the read, as what a task reports may come late
        app.run(lambda _: _on_hosts(main), flags_parser=lambda argv: argv)


def make_workdir(
    path: str, flag: str = "workdir", files_in: Sequence[str] = (), folders_in: Sequence[str] = ()
) -> None:
    """Creates the folder and checks that these files and folders in it can be written.

    Raises UserError naming the flag.
    """
    if not path.strip():
        raise UserError(f"--{flag} is empty: name a folder")
    _make_folder(path, flag, path, files_in, folders_in)


def make_parent(path: str, flag: str = "out") -> None:
    """Creates the folder of this file and checks that the file can be written. Raises UserError naming the flag."""
    _make_folder(path, flag, os.path.dirname(os.path.abspath(path)), [os.path.basename(path)], [])


def _make_folder(path, flag, folder, files_in, folders_in):
    """Creates `folder` and checks what it is for. path: the value of the flag."""
    try:
        os.makedirs(folder, exist_ok=True)
        files.probe(folder)
        for name in files_in:
            files.check_file(os.path.join(folder, name))
        for name in folders_in:
            files.check_folder(os.path.join(folder, name))
    except OSError as e:
        where = "" if e.filename in (path, os.path.abspath(path)) else f"{e.filename}: "
        raise UserError(
            f"--{flag}={path}: cannot be written ({where}{e.strerror}): name another, or move away what is there"
        ) from None
