"""What the commands share."""

import logging
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, one_error

from dit_jax.runtime import process

COMMANDS = sorted({p.stem for p in (ROOT / "dit_jax").glob("*.py") if "cli.run(main)" in p.read_text()})


@pytest.mark.parametrize("name", COMMANDS)
def test_help_does_not_wait_for_jax(name):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"dit_jax.{name}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert f"python -m dit_jax.{name}" in done.stdout and "Try --helpfull" in done.stdout, done.stderr[-1000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dit_jax.cli" in imported and not imported & {"jax", "flax", "orbax", "torch", "sklearn", "matplotlib"}


def test_help_shows_the_flags_that_commands_share():
    done = subprocess.run(
        [sys.executable, "-m", "dit_jax.evaluate", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    for flag in ("samples", "reference", "features", "workdir", "cfg_scale", "process_id"):
        assert f"--{flag}:" in done.stdout


def test_interrupted_is_one_line():
    """While modules are imported, and later; a command that was started to ignore it, as by nohup, goes on."""

    def end_of(handler, then):  # set, as these tests may themselves be started to ignore it
        # As a module of the package, which a command is; what comes at once or never is waited for.
        code = (
            f"import signal, sys, types, time\nsignal.signal(signal.SIGINT, signal.{handler})\n"
            "__spec__ = types.SimpleNamespace(name='dit_jax.train')\nfrom dit_jax import cli\ncli.parse()\n"
            f"{then}\ntime.sleep(1)\nprint('goes on')"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    interrupt = "signal.raise_signal(signal.SIGINT)"
    one_error(end_of("default_int_handler", interrupt), "interrupted")
    one_error(end_of("default_int_handler", f"cli.run(lambda: ({interrupt}, time.sleep(1)))"), "interrupted")
    assert end_of("SIG_IGN", interrupt) == (0, "goes on\n", "")


@pytest.mark.parametrize(
    "flags, threads", [(["--coordinator=h:1"], True), (["--coordinator", "h:1"], True), ([], False)]
)
def test_processes_that_may_share_a_machine_get_enough_threads(flags, threads):
    code = (
        "import os, sys\nfrom dit_jax import cli\ncli.define_hosts()\ncli.parse()\n"
        "cli.app.run = lambda *_, **__: print(int(os.environ.get('PJRT_NPROC', 0)) >= 16)\ncli.run(lambda: None)"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("PJRT_NPROC", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.stdout == f"{threads}\n", done.stderr


@pytest.mark.parametrize("quiet", [process.quiet_orbax_readers, process.quiet_absl, process.quiet_hub])
def test_what_is_silenced_is_so_until_the_last_thread_has_left(quiet):
    from huggingface_hub.utils import logging as hub_logging

    def state():
        levels = [logging.getLogger(name).level for name in ("asyncio", "absl")]
        return sys.unraisablehook, levels, hub_logging.get_verbosity()

    before, first, second = state(), quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state() != before
    second.__exit__(None, None, None)
    assert state() == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or process.accelerator_attached(), reason="malloc_trim is of glibc")
def test_memory_of_the_compiler_is_given_back():
    """By any command, before the arrays of what was compiled are made."""
    code = """if True:
        import sys, jax, jax.numpy as jnp
        from dit_jax.runtime import process
        from dit_jax import cli
        from dit_jax import config
        from dit_jax.parallel import layout
        from dit_jax.parallel import sharding
        from dit_jax.training import setup
        def rss():
            return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])
        def main():
            c = config.paper("DiT-S/8")
            c.batch_size = 4
            c = layout.resolve_auto(config.resolve(c), jax.devices())
            init, step, target = setup.make_programs(c, sharding.make_mesh(data=1, fsdp=1, tensor=1))
            batch = {"x": jax.ShapeDtypeStruct((4, 32, 32, 4), jnp.float32), "y": jax.ShapeDtypeStruct((4,), jnp.int32)}
            lowered, before = step.lower(target, batch), rss()
            lowered.compile()
            print("grown", rss() - before)
        jax.config.update("jax_enable_compilation_cache", False)
        cli.parse()
        cli.run(main)
    """
    grown = {}
    for given_back in (True, False):
        changed = (
            code
            if given_back
            else code.replace("cli.run", "process.return_memory_after_compiling = int\n        cli.run")
        )
        out = subprocess.run(
            [sys.executable, "-c", changed],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        ).stdout
        grown[given_back] = int(re.search(r"grown (-?\d+)", out)[1])
    assert grown[True] < 0.5 * grown[False], grown
