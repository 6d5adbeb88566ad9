"""Commands in processes that are forked from one which has imported what they import of others: seconds less for each."""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from unittest import mock

IMPORTED = [
    "jax",
    "flax.nnx",
    "optax",
    "orbax.checkpoint",
    "scipy.linalg",
    "scipy.special",
    "sklearn.datasets",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(IMPORTED)


def _run(code, argv, cwd, env, out, err):
    for fd, path in enumerate((out, err), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0], sys.argv = cwd, ["-c", *argv]
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()


class Forked:
    """python -c code *argv, with what the tests use of subprocess.Popen. What a library reads of env as it is imported has
    been read before."""

    def __init__(self, code, argv, cwd, env):
        self._folder = tempfile.TemporaryDirectory()  # which goes with this object
        self._out, self._err = (os.path.join(self._folder.name, name) for name in ("out", "err"))
        with mock.patch.dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3"):  # as dit_jax sets it for its commands
            forkserver.ensure_running()
        self._process = CONTEXT.Process(
            target=_run, args=(code, argv, cwd, dict(env), self._out, self._err), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return tuple(open(path).read() for path in (self._out, self._err))
