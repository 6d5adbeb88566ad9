"""Everything that this package changes in the process it runs in. Each function says why, and when it can go.

Signals are the exception: they are in runtime/ending.py. Nothing here imports JAX at the top, because some of these
settings are read while JAX is imported.
"""

import contextlib
import ctypes
import functools
import glob
import hashlib
import logging
import os
import platform
import re
import resource
import signal
import sys
import time
import warnings

from dit_jax.runtime import ending
from dit_jax.runtime.errors import UserError

# Huge pages, no memory map for an array, and a gigabyte of freed memory kept for the next step.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000"


def tpu_attached():
    """Whether this machine has a TPU. JAX is not asked: to ask it takes the TPU."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def accelerator_attached():
    """Whether this machine has a TPU or a GPU."""
    return tpu_attached() or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))


def before_imports():
    """Settings that are read while the interpreter or JAX starts. For commands only; called before JAX is imported."""
    restart_with_malloc_settings()
    quiet_xla()


def restart_with_malloc_settings():
    """Starts this process anew (same number, same arguments) with MALLOC, which glibc reads only at its start.

    Why: XLA on CPU gives all memory back after a step and takes it again from the kernel in pages of 4 KiB, which is 6 %
    of DiT-S/2's step. Can go when XLA's CPU client keeps its buffers between steps.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and not accelerator_attached():
        ending.start_anew(os.environ | {"GLIBC_TUNABLES": MALLOC})


def quiet_xla():
    """Silences XLA's log.

    Why: when a host is lost, XLA prints pages about it beside our line. Can go when jaxlib reports a lost host only as an
    exception.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quiet_libtpu():
    """Tells libtpu what it would ask a metadata server for, where there is no TPU.

    Why: libtpu (installed for preflight) otherwise waits for that server and complains at length. Can go when libtpu
    stays silent without a TPU.
    """
    if not tpu_attached():
        for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v3-8"),
                            ("TPU_WORKER_HOSTNAMES", "localhost")):
            os.environ.setdefault(name, value)


def compile_only():
    """Lets libtpu compile for a slice that is not there, beside other processes that do the same.

    Why: libtpu otherwise asks a metadata server and locks the TPU for one process. Can go when libtpu does neither for
    compile-only topologies.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def enough_threads():
    """Gives XLA on CPU 16 threads where several devices or processes share the machine.

    Why: a collective holds a thread until every device has come to it, and devices come to independent ones in any
    order, so with as many threads as cores they can wait for each other for ever. Can go when XLA's CPU collectives no
    longer hold a thread.
    """
    if "device_count" in os.environ.get("XLA_FLAGS", "") or any(a.startswith("--coordinator") for a in sys.argv):
        os.environ.setdefault("PJRT_NPROC", str(max(16, os.cpu_count())))


def same_threads():
    """Gives XLA on CPU 16 threads on every machine. Called before JAX is imported.

    Why: XLA on CPU splits sums by the number of its threads, and a latent cache is the same to the byte wherever it is
    made. Can go when XLA's CPU reductions do not depend on the number of threads.
    """
    if not tpu_attached():
        os.environ.setdefault("PJRT_NPROC", "16")


def cpu_without_accelerator():
    """Makes JAX use the CPU where there is no accelerator and the user names no platform.

    Why: JAX otherwise loads an installed libtpu, whose tracer may crash without a TPU. Can go when it does not.
    """
    import jax
    if not accelerator_attached() and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def cpu_only():
    """Makes JAX use the CPU. Why: this process does no arithmetic, and a TPU belongs to one process at a time."""
    import jax
    jax.config.update("jax_platforms", "cpu")


def one_step_at_a_time():
    """Makes JAX on CPU finish a program before it returns.

    Why: a collective of one step must not wait behind the next step's; two in flight can lock up. Can go when XLA's CPU
    client orders collectives.
    """
    import jax
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def return_memory_after_compiling():
    """Returns to the kernel what XLA's compiler has freed: 0.3 GB after a training step's.

    Why: glibc keeps it with the threads that compiled, where no array can use it. Can go with MALLOC.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is None:
        return
    from jax import monitoring

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration" and seconds > 0.2:
            trim(0)

    monitoring.register_event_duration_secs_listener(listen)


def quiet_logs():
    """Silences what absl's and Python's loggers print.

    Why: libraries log what they then raise (orbax with a traceback for each thread), and our one line says it. Can go
    when orbax logs an error or raises it, but not both.
    """
    from absl import logging as absl_logging
    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.set_stderrthreshold("fatal")


@functools.cache
def quiet_orbax_readers():
    """Drops the tracebacks of orbax's reading tasks.

    Why: orbax reads arrays in tasks side by side; where one fails, the others still write theirs, some at exit, and the
    one error that counts is raised besides. Can go when orbax gathers its tasks' errors.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    hook, unraisable = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, e, tb: str(e) == "Event loop is closed" or hook(kind, e, tb)
    sys.unraisablehook = lambda u: "_read_" in repr(u.object) or "loop is closed" in str(u.exc_value) or unraisable(u)


def quiet_pillow():
    """Silences Pillow's warnings in this process.

    Why: odd metadata does not matter here, and wrong pixels raise. Filters around each call are not safe in threads. Can
    go when they are (Python 3.14's context-aware warnings).
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def silence_stdout():
    """Sends stdout of C++ to nowhere, and keeps Python's.

    Why: the CPU's collectives (gloo) greet on stdout in every process. Can go when gloo does not.
    """
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def on_lost_host(lost):
    """Calls lost() where jaxlib would abort the process because another host is lost.

    Why: jaxlib aborts with a stack trace unless it gets a callback; to call one from Python it must convert an
    absl::Status, which it cannot (0.10.2), and ends in std::terminate. So both lead to `lost`. Without them (another
    jaxlib, no libstdc++) the abort stays. Can go when jax.distributed.initialize takes a callback that works.
    """
    try:
        from jax._src import distributed
        distributed._jax.get_distributed_runtime_client = functools.partial(
            distributed._jax.get_distributed_runtime_client, missed_heartbeat_callback=lambda *_: lost())
        on_lost_host.handler = ctypes.CFUNCTYPE(None)(lost)  # kept alive
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(on_lost_host.handler)
    except (AttributeError, OSError):
        pass


def allow_open_files(count):
    """Raises this process's limit on open files to `count` and some more. Raises UserError where the system forbids it.

    Why: readers keep every shard open, and often no more than 1024 files are allowed by default.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise UserError(f"{count} shards are to be kept open, and this system lets a process open {hard} files: raise "
                             f"the limit (ulimit -Hn) to {wanted}, or make larger shards")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def end_with_parent(parent=None):
    """Ends this process when the one that started it is killed (Linux). parent: that one's number, to see whether it was
    killed before this call.

    Why: a killed benchmark or study must not leave its commands behind.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent not in (None, os.getppid()):
            os._exit(1)


def keep_compiled(shared=None):
    """Keeps what XLA compiles for the next start, in ~/.cache/dit_jax. JAX's own JAX_COMPILATION_CACHE_DIR goes first.

    shared: a folder for it where several hosts run one program, which only the first of them writes. Several hosts on
    CPU keep nothing: there each host has another key and only the first writes, so that it alone would find its program,
    and then wait for the others, which compile, longer than Gloo waits.
    """
    import jax
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    kind = jax.default_backend()
    if kind == "cpu":  # a program for one CPU may not run on another, and JAX does not tell them apart
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
            features = re.search(r"^(flags|Features)\s*:.*$", f.read(), re.MULTILINE)
            kind += "-" + hashlib.sha256(f"{platform.machine()} {features and features[0]}".encode()).hexdigest()[:12]
    folder = os.path.join(shared if shared and jax.process_count() > 1 else os.path.join(home, "dit_jax"), kind)
    with contextlib.suppress(OSError):  # a home that cannot be written: no cache
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", folder)
            # By default what took less than a second is not kept, such as the fingerprints of a checkpoint.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
            # An entry that a kill or a full disk cut short does not concern the user: the program is compiled again.
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file() and not entry.stat().st_size and time.time() - entry.stat().st_mtime > 60:
                        os.remove(entry.path)  # else it would stay so for good
