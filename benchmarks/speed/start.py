"""The child that times a start: a command that makes one picture in a few guided steps of weights on disk.

It is timed from its beginning to its end. Beside it stands such a command with diffusers, on weights in that package's
format.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time

from benchmarks.speed.child import Timed, serve
from dit_jax.runtime.process import MALLOC

STEPS = 4
# `sample`, with the settings of a command. It writes down when all was imported, when the weights were loaded, and how
# long it compiled.
SAMPLE = """
from dit_jax.runtime import process
process.before_imports()
import atexit, json, runpy, sys, time
began, out = float(sys.argv[1]), sys.argv[2]
from dit_jax import cli
marks, run = {"compiled": 0.0}, cli.run
def imported(main):
    from dit_jax.sampling.generator import Generator
    from jax import monitoring
    marks["imported"], init = time.time() - began, Generator.__init__
    def loaded(self, *args, **settings):
        marks["loaded"] = time.time() - began
        init(self, *args, **settings)
    def compiled(event, seconds, **_):
        if "loaded" in marks and event == "/jax/core/compile/backend_compile_duration":
            marks["compiled"] += seconds
    Generator.__init__ = loaded
    monitoring.register_event_duration_secs_listener(compiled)
    atexit.register(lambda: json.dump(marks, open(out, "w")))
    run(main)
cli.run = imported
del sys.argv[1:3]
runpy.run_module("dit_jax.sample", run_name="__main__", alter_sys=True)
"""
PYTORCH = """
import sys
from benchmarks.speed import pytorch_side
pytorch_side.first_picture(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""
WEIGHTS = "import json, sys; from benchmarks.speed import {0}; {0}.make_weights(json.loads(sys.argv[1]), sys.argv[2])"


def make_weights(config, path):
    """Writes a weights file of the published format, of any numbers."""
    import jax
    import numpy as np

    from dit_jax import config as configs
    from dit_jax.models import dit
    from dit_jax.parallel import layout
    from dit_jax.weights import files, published

    args, rng = configs.dit_args(layout.resolve_auto(config, jax.devices())), np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.standard_normal(a.shape, np.float32) * np.float32(0.02), dit.abstract(**args)[1]
    )
    files.write(path, published.to_published(params, args))


def run(*command, **settings):
    """Runs Python and returns the most bytes that it held. Where it fails, raises ValueError with its last error."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **settings
    )
    assert process.stderr
    errors = re.findall(r"^(?:[\w.]*Error|error): (.+)", process.stderr.read(), re.MULTILINE)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(errors[-1] if errors else f"a process of it ended with status {process.returncode}")
    return 1024 * usage.ru_maxrss


def sample(weights, num_heads, env, compiled):
    """Runs `sample` once and returns {"seconds", "memory", "phases": {name: seconds}}.

    compiled: the folder of compiled programs, or None where nothing is compiled yet.
    """
    with tempfile.TemporaryDirectory(dir=os.path.dirname(weights)) as folder:
        marks, start = os.path.join(folder, "marks.json"), time.time()
        memory = run(
            "-c",
            SAMPLE,
            str(start),
            marks,
            f"--weights={weights}",
            f"--num_heads={num_heads}",
            "--num=1",
            f"--steps={STEPS}",
            "--cfg_scale=4",
            f"--out={folder}/out",
            env=env | {"JAX_COMPILATION_CACHE_DIR": compiled or folder},
        )
        seconds = time.time() - start
        with open(marks) as f:
            found = json.load(f)
    return {
        "seconds": seconds,
        "memory": memory,
        "phases": {
            "imports": found["imported"],
            "loading": found["loaded"] - found["imported"],
            "compiling": found["compiled"],
            "the rest": seconds - found["loaded"] - found["compiled"],
        },
    }


def make(spec):
    """Returns a Timed whose call is a start.

    spec: side, "fresh" (nothing is compiled yet), "again" or "pytorch"; config, a resolved one; folder, of the weights;
    threads, PyTorch's.
    """
    config, side, folder = spec["config"], spec["side"], spec["folder"]
    name, module = ("pytorch", "pytorch_side") if side == "pytorch" else ("weights.npz", "start")
    weights, compiled = os.path.join(folder, name), os.path.join(folder, "compiled")
    env = {k: v for k, v in os.environ.items() if (k, v) != ("GLIBC_TUNABLES", MALLOC)}  # `sample` sets it itself
    if not os.path.exists(weights):
        run("-c", WEIGHTS.format(module), json.dumps(config), weights, env=env)

    def call():
        if side == "pytorch":
            return {"memory": run("-c", PYTORCH, weights, str(STEPS), str(spec["threads"]), env=env)}
        return sample(weights, config["model"]["num_heads"], env, compiled if side == "again" else None)

    if side == "again":
        call()
    return Timed(call, {"images": 1})


if __name__ == "__main__":
    serve(make)
