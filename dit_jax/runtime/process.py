"""Everything that this package changes in the process it runs in. Each function says why, and when it can go.

Signals are the exception: runtime/ending.py handles them. Nothing here imports JAX at the top, because some of these
settings are read while JAX is imported. "Tested" means with the function's effect taken away, on CPU with jax 0.10.2,
libtpu 0.0.52, orbax 0.12.8 and Pillow 13.0.
"""

import contextlib
import ctypes
import functools
import gc
import glob
import hashlib
import logging
import os
import platform
import re
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from dit_jax.runtime import ending
from dit_jax.runtime.errors import UserError

# Of glibc: huge pages, no memory map for an array, and a gigabyte of freed memory kept for the next step.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000"
_kept_alive = []  # functions that C++ calls


def tpu_attached() -> bool:
    """Returns whether this machine has a TPU. JAX is not asked: it would take the TPU for this process."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def accelerator_attached() -> bool:
    """Returns whether this machine has a TPU or a GPU."""
    return tpu_attached() or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))


def before_imports() -> None:
    """Makes a command's settings that are read while the interpreter or JAX starts. Called before JAX is imported."""
    restart_with_malloc_settings()
    quiet_xla()


def restart_with_malloc_settings() -> None:
    """Starts this process anew (same number, same arguments) with MALLOC, which glibc reads only when a process starts.

    Why: XLA on CPU gives all memory back after a step and takes it again from the kernel in pages of 4 KiB. Tested: a
    step of DiT-S/4 has 95,000 page faults without, 600 with, and takes 10 % less time. Can go when XLA's CPU client
    keeps its buffers between steps.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and not accelerator_attached():
        ending.restart(os.environ | {"GLIBC_TUNABLES": MALLOC})


def quiet_xla() -> None:
    """Silences XLA's log.

    Why: when a host is lost, XLA logs it beside our line (tested). Can go when jaxlib only raises an exception then.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quiet_libtpu() -> None:
    """Names a TPU and a host to libtpu on a machine without a TPU. Called before JAX looks for devices.

    Why: libtpu is loaded there for preflight, and by JAX on a GPU's machine. It prints that these two are missing
    (tested). JAX itself keeps it from asking a metadata server for them. Can go when libtpu stays silent without a TPU.
    """
    if not tpu_attached():
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v3-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def compile_only() -> None:
    """Lets libtpu compile for a slice that this machine does not have, beside other processes that do the same.

    Why: libtpu locks the TPU for one process, also without a TPU (tested: the second process fails). On a machine with
    a TPU it also asks a metadata server, and waits for minutes if there is none (tested). Can go when libtpu does
    neither for compile-only topologies.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def no_compilation_cache() -> None:
    """Keeps no compiled programs.

    Why: without a TPU, a compiled TPU program cannot be read back, and a measured compilation must not come from a
    cache. The first reason can go when JAX reads programs of compile-only topologies back.
    """
    import jax

    jax.config.update("jax_enable_compilation_cache", False)


def own_preemption() -> None:
    """Keeps jax.distributed from handling SIGTERM.

    Why: runtime/hosts.py handles it: all hosts stop after the same step. Can go when jax.distributed does so and tells.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)


def enough_threads(several_processes: bool) -> None:
    """Gives XLA on CPU at least 16 threads, and two for each device, if devices or processes share the machine.

    Why: a collective holds a thread until every device has come to it, and devices come to independent collectives in
    any order. With as many threads as cores they can wait for each other until XLA aborts (tested with 8 and 16
    devices). Can go when XLA's CPU collectives no longer hold a thread.
    """
    devices = re.findall(r"device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if devices or several_processes:
        os.environ.setdefault("PJRT_NPROC", str(max(16, os.cpu_count() or 1, *(2 * int(n) for n in devices))))


def same_threads() -> None:
    """Gives XLA on CPU 16 threads on every machine. Called before JAX is imported.

    Why: XLA on CPU splits sums by the number of its threads (tested: 1 and 2 threads encode to different bytes), and a
    latent cache must be the same to the byte wherever it is made. Can go when XLA's CPU reductions do not depend on the
    number of threads.
    """
    if not tpu_attached():
        os.environ.setdefault("PJRT_NPROC", "16")


def cpu_without_accelerator() -> None:
    """Makes JAX use the CPU if there is no accelerator and the user names no platform.

    Why: JAX otherwise loads an installed libtpu, whose tracer crashes without a TPU (tested: jax.profiler.start_trace
    ends in a segmentation fault). Can go when it does not.
    """
    import jax

    named = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if not named and not accelerator_attached():
        jax.config.update("jax_platforms", "cpu")


def cpu_only() -> None:
    """Makes JAX use the CPU.

    Why: the commands that call this do no arithmetic, and a TPU belongs to one process at a time. Can go when several
    processes can use a TPU.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")


def one_step_at_a_time() -> Callable[[], None]:
    """Makes JAX on CPU finish a program before the call of it returns. Returns a function that undoes it.

    Why: a collective of one step can wait behind one of the next step; with two steps in flight they can lock up. (Not
    seen in a test of 3,000 steps on 8 devices with 16 threads.) Can go when XLA's CPU client orders collectives.
    """
    import jax

    before = jax.config.values["jax_cpu_enable_async_dispatch"]
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return functools.partial(jax.config.update, "jax_cpu_enable_async_dispatch", before)


def return_memory_after_compiling() -> None:
    """Returns to the kernel the memory that XLA's compiler has freed: 0.3 GB after compiling a training step.

    Why: glibc keeps it with the threads that compiled, where no array can use it (tests/cli_test.py measures it). Can
    go with MALLOC.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is None:
        return
    from jax import monitoring

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > 0.2:
            trim(0)

    monitoring.register_event_duration_secs_listener(listen)


def quiet_logs() -> None:
    """Silences the loggers of absl and Python.

    Why: orbax logs over a hundred lines about itself in a run (tested), and errors that it also raises. Can go when
    orbax logs neither by default.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.set_stderrthreshold("fatal")


def _within_block(
    change: Callable[[], Callable[[], object]],
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Decorates change(), which returns a function that undoes it, to make it hold within a block.

    Threads may be in such blocks at the same time: the change holds until the last one has left.
    """
    lock, inside, undo = threading.Lock(), 0, None

    @contextlib.contextmanager
    @functools.wraps(change)
    def block() -> Iterator[None]:
        nonlocal inside, undo
        with lock:
            undo = undo or change()
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    undo()
                    undo = None

    return block


@_within_block
def quiet_orbax_readers() -> Callable[[], None]:
    """Drops the tracebacks of orbax's reading tasks within the block.

    Why: orbax reads the arrays of a checkpoint in concurrent tasks. If one fails, it raises that error, and then the
    others report theirs: to asyncio's logger, as an exception of a callback after the loop is closed, or as one of a
    coroutine that Python discards unfinished (seen, all three). The last kind can come long after the read, so the end
    of the block discards what is unfinished. Can go when orbax collects the errors of its tasks.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = logger.level

    def of_a_reader(u):
        code = getattr(u.object, "cr_code", None)
        return "loop is closed" in str(u.exc_value) or (code and f"{os.sep}orbax{os.sep}" in code.co_filename)

    def undo():
        gc.collect()
        logger.setLevel(level)
        sys.unraisablehook = hook

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda u: None if of_a_reader(u) else hook(u)
    return undo


@_within_block
def quiet_absl() -> Callable[[], None]:
    """Silences absl's warnings within the block.

    Why: orbax warns that a reader reads only, which it was asked for. Can go when it does not.
    """
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(max(before, logging.ERROR))
    return functools.partial(logger.setLevel, before)


def quiet_pillow() -> None:
    """Silences Pillow's warnings in this process, which is a command's.

    Why: Pillow warns of odd metadata (tested: damaged EXIF), which does not matter here; wrong pixels raise. A filter
    around each call is not safe in threads. Can go when it is (Python 3.14's context-aware warnings).
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


@_within_block
def quiet_hub() -> Callable[[], None]:
    """Silences huggingface_hub's warnings within the block.

    Why: it logs each retry, and then raises the error that our one line reports. Can go when it only raises.
    """
    from huggingface_hub.utils import logging as hub_logging  # sets its level when it is imported

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    return functools.partial(hub_logging.set_verbosity, before)


def quiet_gradio() -> None:
    """Keeps Gradio from reporting to its makers, and from asking for its newest version. Called before it is imported.

    Why: it does both by default, and the machine may have no internet. Can go when it does not.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def silence_stdout() -> None:
    """Discards what C++ prints to stdout; Python's stdout stays.

    Why: the collectives on CPU (gloo) print a greeting in every process (tested). Can go when they do not.
    """
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def on_lost_host(lost: Callable[[], object]) -> None:
    """Calls lost() where jaxlib would abort the process because another host is lost.

    Why: jaxlib aborts with a stack trace unless it has a callback (tested). To call one in Python it must convert an
    absl::Status, which it cannot: it ends in std::terminate (tested). So both the callback and the handler of
    std::terminate call `lost`. If one of them cannot be set (another jaxlib, no libstdc++), the abort stays. Can go
    when jax.distributed.initialize takes a callback that works.
    """
    try:
        from jax._src import distributed

        jaxlib = distributed._jax  # pyright: ignore[reportPrivateImportUsage]
        jaxlib.get_distributed_runtime_client = functools.partial(
            jaxlib.get_distributed_runtime_client, missed_heartbeat_callback=lambda *_: lost()
        )
        handler = ctypes.CFUNCTYPE(None)(lost)
        _kept_alive.append(handler)
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(handler)
    except (AttributeError, OSError):
        pass


def allow_open_files(count: int) -> None:
    """Raises this process's limit on open files to `count` plus 512. Raises UserError if the system forbids it.

    Why: readers keep every shard open, and the default limit is often 1024 files. Can go when readers open fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise UserError(
                f"{count} shards are to be kept open, and this system lets a process open {hard} files: raise "
                f"the limit (ulimit -Hn) to {wanted}, or make larger shards"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def end_with_parent(parent: int | None = None) -> None:
    """Ends this process when the process that started it is killed (Linux).

    parent: the number of that process, to end at once if it was killed before this call.

    Why: a killed benchmark or study must not leave its commands running. Can go when no command starts others.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent not in (None, os.getppid()):
            os._exit(1)


def cache_folder() -> str:
    """Returns the folder in which this package keeps what it can make or fetch again: ~/.cache/dit_jax."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "dit_jax")


def keep_compiled(shared: str | None = None) -> None:
    """Keeps compiled programs for the next start, in ~/.cache/dit_jax. JAX_COMPILATION_CACHE_DIR takes precedence.

    shared: the folder to use if several hosts run one program, which only the first of them writes.

    Several hosts on CPU keep nothing. There each host has its own key and only the first one writes (tested): it alone
    would find its program, and then wait longer than Gloo allows for the others, which compile.

    Why: compiling takes up to minutes at each start. Can go when JAX keeps compiled programs by default.
    """
    import jax

    # An entry that was cut short by a kill or a full disk is harmless: the program is compiled again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    kind = jax.default_backend()
    if kind == "cpu":  # a program for one CPU may not run on another, and JAX's key does not tell them apart
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
            features = re.search(r"^(flags|Features)\s*:.*$", f.read(), re.MULTILINE)
            kind += "-" + hashlib.sha256(f"{platform.machine()} {features and features[0]}".encode()).hexdigest()[:12]
    folder = os.path.join(shared if shared and jax.process_count() > 1 else cache_folder(), kind)
    with contextlib.suppress(OSError):  # a home that cannot be written: no cache
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", folder)
            # By default JAX keeps no program that compiles in less than a second, such as a checkpoint's fingerprints.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file() and not entry.stat().st_size and time.time() - entry.stat().st_mtime > 60:
                        os.remove(entry.path)  # JAX never writes an entry again
