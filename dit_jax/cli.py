"""What the commands share: flags, configs from files, and errors in one line.

A command imports this before all else, since from here on a signal is one line, and defines and parses its flags above
the imports: JAX takes most of a second to import, for which --help and a mistaken flag need not wait. So nothing here
imports it before `run`.
"""

import os
import sys
import traceback

from dit_jax.runtime import ending, process

if ending.is_command():  # before the imports that take time
    process.before_imports()
    ending.begin()

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from dit_jax.config import unknown_field
from dit_jax.runtime import files
from dit_jax.runtime.errors import UserError, line_of

flags.disclaim_key_flags()  # --help shows the flags that are defined here as the command's own


def define_config(required=True):
    """The flags --config=FILE and --config.a.b=c."""
    config_flags.DEFINE_config_file("config", None, "a file of configs/; --config.a.b=c sets a field", lock_config=True)
    if required:
        flags.register_validator("config", lambda c: c is not None,
                                 "is missing: name a file, e.g. --config=configs/digits.py")


def define_hosts():
    """The flags of hosts.join."""
    flags.DEFINE_string("coordinator", None, "several hosts that are no TPU slice: HOST:PORT of process 0")
    flags.DEFINE_integer("process_count", None, "how many processes there are; 1: this host alone, also on a TPU slice")
    flags.DEFINE_integer("process_id", None, "which of them this one is, from 0")
    flags.DEFINE_float("host_timeout", 60, "seconds without a sign of a host after which it is lost", lower_bound=1, upper_bound=86_400)
    flags.register_validator("host_timeout", lambda seconds: seconds == seconds, "is no number of seconds")


def define_samples(num, classes, cfg_scale):
    """The flags of samples(); the arguments are defaults."""
    define_path("workdir", None, "a run's folder")
    flags.DEFINE_integer("step", None, "which checkpoint of the run; by default the newest")
    define_path("weights", None, "instead of a run: a .pt or .npz file of the published format")
    flags.DEFINE_integer("num_heads", None, "of --weights whose width is none of the paper's", lower_bound=1)
    flags.DEFINE_integer("num_classes", None, "of --weights without a null class: as many as they have labels",
                         lower_bound=1)
    flags.DEFINE_enum("which", "ema", ["ema", "raw"], "EMA or raw weights")
    define_path("vae", None, "the decoder of latents: a file, a folder, or a published name, as in "
                        "stabilityai/sd-vae-ft-ema; by default the run's; empty: none")
    flags.DEFINE_integer("num", num, "how many images")
    flags.DEFINE_string("classes", classes, "balanced (all in turn), random, or numbers as in 3,7 (in turn)")
    flags.DEFINE_float("cfg_scale", cfg_scale, "classifier-free guidance; 1 is none")
    flags.DEFINE_integer("cfg_channels", 3, "how many channels of epsilon are guided, the first ones; 0: all")
    flags.DEFINE_enum("sampler", "ddpm", ["ddpm", "ddim"], "sampler")
    flags.DEFINE_string("steps", "250", "denoising steps: a number, a,b,c or ddimN")
    flags.DEFINE_float("eta", 0.0, "of ddim: 0 deterministic, 1 as noisy as ddpm")
    flags.DEFINE_integer("seed", 0, "of noise and random classes", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("batch_size", 32, "images at a time, over all devices")
    flags.DEFINE_integer("fsdp", 1, "devices that share the weights")
    flags.DEFINE_integer("tensor", 1, "devices that share a layer")
    define_hosts()


def samples():
    """What the flags of define_samples ask for -> sampling.model.Samples. Raises UserError naming the flag."""
    from dit_jax.parallel import sharding
    from dit_jax.sampling.model import Samples, Settings
    from dit_jax.vae.files import load as load_vae
    from dit_jax.weights import load

    f = flags.FLAGS
    if (f.workdir is None) == (f.weights is None):
        raise UserError("say --workdir=RUN or --weights=FILE, one of them")
    if f.workdir is not None and not f.workdir.strip():
        raise UserError("--workdir is empty: name a run's folder")
    if f.weights and f.step is not None:
        raise UserError("--step is of a run's checkpoints: it goes with --workdir")
    mesh = sharding.make_mesh(data=-1, fsdp=f.fsdp, tensor=f.tensor)
    if f.workdir is not None:
        loaded = load.from_run(f.workdir, mesh, f.which, f.step)
    else:
        loaded = load.from_file(f.weights, mesh, f.which, f.num_heads, f.num_classes)
    vae = loaded.vae if f.vae is None else f.vae
    settings = Settings(f.seed, f.sampler, f.steps, f.eta, f.cfg_scale, f.cfg_channels)
    return Samples(loaded, mesh, load_vae(vae) if vae else None, num=f.num, classes=f.classes, settings=settings,
                   batch_size=f.batch_size)


def define_source():
    """The flags of data.pictures.open_pictures."""
    flags.DEFINE_enum("source", "folder", ["folder", "tfds"], "a folder of class folders, or a tensorflow-datasets set")
    define_path("path", None, "the folder of class folders, or the data_dir of tensorflow-datasets")
    flags.DEFINE_string("name", None, "of tfds: which data set")
    flags.DEFINE_string("split", "train", "of tfds: which part of it")
    flags.DEFINE_integer("size", 256, "of the pictures, in pixels", lower_bound=8, upper_bound=4096)
    flags.DEFINE_integer("max_skipped", 100, "so many pictures that cannot be used are left out", lower_bound=0)


def define_features():
    """The flags of evaluation.features.load."""
    flags.DEFINE_enum("features", "inception", ["inception", "efflite0"],
                      "the network: the paper's evaluator's, or one that a package carries, for FD-EffLite0")
    define_path("inception", None, "the weights of InceptionV3, pt_inception-2015-12-05-6726825d.pth")
    flags.DEFINE_integer("features_batch_size", 32, "pictures a device through the network at a time", lower_bound=1,
                         upper_bound=4096)


class _Path(flags.ArgumentParser):
    def parse(self, text):
        return files.user_path(text)


def define_path(name, default, help, **settings):
    """A flag that names a file or folder."""
    flags.DEFINE(_Path(), name, default, help, serializer=flags.ArgumentSerializer(), **settings)


def _last_line(error):
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _parse_flags(argv):
    for arg in argv[1:]:
        if any("\ud800" <= c < "\ue000" for c in arg):
            raise UserError(f"{os.fsencode(arg).decode(errors='backslashreplace')}: is not UTF-8")
    path = "FILE"
    for arg, following in zip(argv[1:], argv[2:] + [""]):
        if arg == "--config" or arg.startswith("--config="):
            path = arg.partition("=")[2] or following
            if not os.path.isfile(path.split(":")[0]):
                raise UserError(f"--config={path}: no such file")
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
    except Exception as e:  # whatever a config file raises while it is read
        if isinstance(e, OSError) and e.filename is None:  # of stdout, where --help goes
            raise
        raise UserError(f"--config={path}: cannot be read ({type(e).__name__}: {_last_line(e)})") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: values are given as --flag=value")
    config = flags.FLAGS.config if "config" in flags.FLAGS else None
    if config is not None and not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config() must return a ConfigDict")
    return rest


def _on_hosts(main):
    """main(), where other hosts may take part: they are told of its errors, or it is told of theirs."""
    from dit_jax.runtime import hosts  # imports JAX

    process.cpu_without_accelerator()
    try:
        if "coordinator" in flags.FLAGS:
            f = flags.FLAGS
            hosts.join(f.coordinator, f.process_count, f.process_id, f.host_timeout)
        status = main()
        hosts.finish()
        ending.finish(status or 0)
    except FloatingPointError:  # of --debug_nans, whose user asks for the traceback
        traceback.print_exc()
        os._exit(1)
    except (Exception, KeyboardInterrupt) as e:
        hosts.fail(e)


def parse():
    """Parses the flags; --help ends here. A UserError is one line, and status 1."""
    ending.begin()
    app.define_help_flags()
    try:
        try:
            _parse_flags(sys.argv)
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # --help, perhaps | head
        os._exit(0)
    except (UserError, OSError) as e:
        ending.end(1, line_of(e))


def run(main):
    """Calls main(), whose value is the exit status. An exception is one line, and status 1."""
    process.quiet_libtpu()
    process.enough_threads()
    process.return_memory_after_compiling()
    process.quiet_logs()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    app.run(lambda _: _on_hosts(main), flags_parser=lambda argv: argv)


def make_workdir(path, flag="workdir", files_in=(), folders_in=()):
    """Makes the folder, and makes sure that it can be written, and in it these files and folders."""
    if not path.strip():
        raise UserError(f"--{flag} is empty: name a folder")
    _look(path, flag, path, files_in, folders_in)


def make_way(path, flag="out"):
    """Makes the folder of this file, and makes sure that the file can be written."""
    _look(path, flag, os.path.dirname(os.path.abspath(path)), [os.path.basename(path)], [])


def _look(path, flag, folder, files_in, folders_in):
    try:
        os.makedirs(folder, exist_ok=True)
        files.probe(folder)
        for name in files_in:
            files.check_file(os.path.join(folder, name))
        for name in folders_in:
            files.check_folder(os.path.join(folder, name))
    except OSError as e:
        where = "" if e.filename in (path, os.path.abspath(path)) else f"{e.filename}: "
        raise UserError(f"--{flag}={path}: cannot be written ({where}{e.strerror}): name another, or move away what is there"
                        ) from None
