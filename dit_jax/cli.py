"""What the commands share: flags, configs from files, and errors in one line."""

import contextlib
import fcntl
import os
import sys
import uuid

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dit_jax import hosts
from dit_jax.config import UserError, unknown_field


def define_config(required=True):
    """The flags --config=FILE and --config.a.b=c."""
    config_flags.DEFINE_config_file("config", None, "a file of configs/; --config.a.b=c sets a field", lock_config=True)
    if required:
        flags.register_validator("config", lambda c: c is not None,
                                 "is missing: name a file, e.g. --config=configs/digits.py")


def _last_line(error):
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _parse_flags(argv):
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
        raise UserError(f"--config={path}: cannot be read ({type(e).__name__}: {_last_line(e)})") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: values are given as --flag=value")
    config = flags.FLAGS.config if "config" in flags.FLAGS else None
    if config is not None and not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config() must return a ConfigDict")
    return rest


def _quiet_libtpu():
    """Without a TPU, libtpu (installed for preflight, say) asks a metadata server what machine this is, and complains
    at length that it does not know."""
    if not hosts.tpu_attached():
        for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v3-8"),
                            ("TPU_WORKER_HOSTNAMES", "localhost")):
            os.environ.setdefault(name, value)


def enough_threads():
    """On CPU a collective holds a thread until every device has come to it, and devices come to independent ones in
    any order: with no more threads than cores, several fake devices, or processes, can wait for each other for ever."""
    if "device_count" in os.environ.get("XLA_FLAGS", "") or any(a.startswith("--coordinator") for a in sys.argv):
        os.environ.setdefault("PJRT_NPROC", str(max(16, os.cpu_count())))


def _on_hosts(main):
    """main(), where other hosts may take part: they are told of its errors, or it is told of theirs."""
    if "coordinator" not in flags.FLAGS:
        return main()
    accelerators = hosts.tpu_attached() or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))
    if not accelerators and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # else JAX loads a libtpu, whose tracer may crash without a TPU
    hosts.join()
    try:
        status = main()
        hosts.finish()
        return status
    except (Exception, KeyboardInterrupt) as e:
        hosts.report(e)
        raise


def run(main):
    """Parses the flags and calls main(), whose value is the exit status. A UserError, or Ctrl-C, is one line, and status 1."""
    _quiet_libtpu()
    enough_threads()
    logging.set_verbosity(logging.ERROR)
    logging.set_stderrthreshold("error")
    try:
        app.run(lambda _: _on_hosts(main), flags_parser=lambda argv: _parse_flags(argv))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(1)


def make_workdir(path, flag="workdir"):
    """Makes the folder, and makes sure that it can be written."""
    if not path.strip():
        raise UserError(f"--{flag} is empty: name a folder")
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe-{uuid.uuid4().hex}")
        open(probe, "w").close()
        os.remove(probe)
    except OSError as e:
        raise UserError(f"--{flag}={path}: cannot be written ({e.strerror})") from None


@contextlib.contextmanager
def locked(path, flag):
    """Holds the folder against a second command that would write there as well; on the first host. Nothing is left in
    it, and a process that dies lets go. Some network file systems have no locks: there nothing is held."""
    if jax.process_index():
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"--{flag}={path}: another process is writing there: wait for its end, or name another folder"
                        ) from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(folder)
