"""What `command` of conftest.py runs in a process that is forked from one in which JAX has been imported: seconds less."""

import atexit
import os
import runpy
import sys

# What is imported but not dit_jax's, and starts no threads.
IMPORTED = ["jax", "flax.nnx", "optax", "orbax.checkpoint", "scipy.linalg", "scipy.special", "matplotlib"]


def run(name, argv, cwd, env, out, err):
    """python -m dit_jax.{name} *argv, its output in the files out and err."""
    for fd, path in enumerate((out, err), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.update(env)
    sys.path[0], sys.argv = cwd, ["", *argv]
    try:
        runpy.run_module(f"dit_jax.{name}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
