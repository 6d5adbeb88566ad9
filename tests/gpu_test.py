"""What has to be true on a GPU. Each check is a process of its own: in this one JAX has the CPU.

Where there is no GPU the checks run on the CPU as slow tests, so that they are not first tried on a GPU.
"""

import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, ROOT, TINY, nhwc
from flax import nnx

from dit_jax import config as configs
from dit_jax.models import blocks, dit
from dit_jax.parallel import chips, layout, sharding
from dit_jax.training import setup
from dit_jax.weights import files as weight_files, published


def run(code, platform):
    """Runs Python code in tests/ on this platform: a finished process."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC", "JAX_COMPILATION_CACHE_DIR")}
    # Beside the GPU the CPU, to compare with. Two tests at a time share its memory.
    env |= {
        "JAX_PLATFORMS": "cpu" if platform == "cpu" else f"{platform},cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", env=env, capture_output=True, text=True, timeout=900
    )


@functools.cache
def no_gpu():
    """Why there is no GPU for these tests; empty if there is one."""
    if not shutil.which("nvidia-smi") and not os.path.exists("/dev/nvidiactl"):
        return "this machine has no NVIDIA GPU (no nvidia-smi, no /dev/nvidiactl)"
    done = run("import jax; jax.devices('cuda')", "cuda")
    return done.returncode and f"JAX has no GPU (pip install -e '.[cuda]'): {done.stderr.strip().splitlines()[-1]}"


@pytest.mark.parametrize(
    "platform", [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("check", ["forward", "training", "commands", "devices", "attention"])
def test_on(platform, check, tmp_path):
    if platform == "cuda" and (why := no_gpu()):
        pytest.skip(why)
    done = run(f"import gpu_test; gpu_test.check_{check}({str(tmp_path)!r})", platform)
    assert done.returncode == 0, done.stdout + done.stderr


def check_forward(folder):
    """The published code's arrays: in float32, and in the device's own dtype as near as its rounding allows."""
    for which in "ab":
        z = np.load(GOLDEN / "dit" / f"dit_{which}_forward.npz")
        args = json.loads(str(z["geometry"]))
        npz, pt = (GOLDEN / "dit" / f"dit_{which}{end}" for end in ("_weights.npz", ".pt"))
        params = published.from_published(dict(weight_files.read(str(npz if npz.exists() else pt))), args)
        x, expected = nhwc(z["x"]), nhwc(z["out"])
        for dtype, tolerance in ((np.float32, 2e-5), (layout.compute_dtype(jax.devices()), 0.03)):
            for scan in (True, False):
                graphdef = dit.abstract(**args | {"dtype": dtype, "scan": scan})[0]
                with jax.default_matmul_precision("highest" if dtype == np.float32 else "default"):
                    out = jax.jit(lambda params: nnx.merge(graphdef, params)(x, z["t"], z["y"]))(params)
                np.testing.assert_allclose(out, expected, atol=tolerance * max(1, np.abs(expected).max()))


@functools.cache
def _losses(device, dtype):
    devices, config = [device], configs.paper("")
    changes = {"model.patch_size": 2, "model.depth": 2, "model.hidden_size": 64, "model.num_heads": 4, "batch_size": 8}
    config.update_from_flattened_dict(changes | {"data.source": "synthetic", "model.dtype": dtype.name})
    config.optimizer.learning_rate = 1e-3
    config = layout.resolve_auto(configs.resolve(config), devices)
    mesh = sharding.make_mesh(**config["mesh"], devices=devices)
    init, step, _ = setup.make_programs(config, mesh)
    rng, state, losses = np.random.default_rng(0), init(jax.random.key(0)), []
    for _ in range(6):
        batch = {"x": rng.standard_normal((8, 32, 32, 4), np.float32), "y": rng.integers(1000, size=8, dtype=np.int32)}
        state, values = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        losses.append(float(values["loss"]))
    return np.array(losses)


def check_training(folder):
    """The same run as on the CPU."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"):
        expected = _losses(cpu, np.dtype(np.float32))
        np.testing.assert_allclose(_losses(device, np.dtype(np.float32)), expected, rtol=1e-3)
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(_losses(device, layout.compute_dtype([device])), expected, rtol=0.03)


def check_commands(folder):
    """train and sample: the memory in the log, and pictures that do not depend on the batch but for rounding."""

    def command(name, *flags):
        done = subprocess.run(
            [sys.executable, "-m", f"dit_jax.{name}", *flags], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = command("train", *TINY, "--config.steps=4", f"--workdir={folder}/run")
    records = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    on_gpu = jax.default_backend() == "gpu"
    assert all(("peak_memory_gib" in r) == on_gpu for r in records) and (" GiB" in out) == on_gpu
    pictures = []
    for batch_size in (2, 5):
        flags = f"--workdir={folder}/run", "--num=5", f"--batch_size={batch_size}", "--steps=10", "--cfg_scale=2"
        assert "the devices waited" in command("sample", *flags, f"--out={folder}/{batch_size}")
        with np.load(f"{folder}/{batch_size}/samples.npz") as file:
            pictures.append(file["arr_0"].astype(int))
    manifest = json.loads(open(f"{folder}/5/manifest.json").read())
    assert manifest["dtype"] == layout.compute_dtype(jax.devices()).name
    assert pictures[0].shape == (5, 8, 8, 3) and np.abs(pictures[0] - pictures[1]).mean() < 4


def check_devices(folder):
    """What layout and chips say of the device at hand, and what the device says of its memory."""
    device, memory = jax.devices()[0], layout.memory_of(jax.devices()[:1])
    print(device.device_kind, getattr(device, "compute_capability", None), memory, chips.data_sheet_flops())
    array = jnp.ones((64, 2**20), jnp.float32).block_until_ready()
    if device.platform != "gpu":
        assert layout.compute_dtype([device]) == np.float32 and chips.peak_memory() is None
        return
    assert (layout.compute_dtype([device]) == jnp.bfloat16) == (float(device.compute_capability) >= 8)
    assert 2**30 < memory < np.inf
    if device.device_kind in chips.GPUS:
        sheet = chips.GPUS[device.device_kind]
        assert memory < 1.1 * sheet.hbm
        # No product is faster than the data sheet says, and a large one is not far below.
        assert 0.3 * sheet.flops < chips.measured_flops(jnp.bfloat16) < 1.1 * sheet.flops
    peak = chips.peak_memory()
    assert peak is not None and array.nbytes <= peak < memory


def check_attention(folder):
    """cuDNN's attention against XLA's, values and gradients, at the paper's head widths and numbers of tokens."""
    on_gpu = jax.default_backend() == "gpu"
    dtype = layout.compute_dtype(jax.devices())
    for tokens, width in ((256, 64), (256, 72), (1024, 72)):
        q, k, v, g = jax.random.normal(jax.random.key(0), (4, 2, 4, tokens, width)).astype(dtype)  # (B, H, N, K) each

        def fused(q, k, v):
            swapped = (a.swapaxes(1, 2) for a in (q, k, v))
            return jax.nn.dot_product_attention(*swapped, implementation="cudnn" if on_gpu else "xla").swapaxes(1, 2)

        def both(attention, q, k, v, g):
            out, backward = jax.vjp(attention, q, k, v)
            return out, *backward(g)

        expected = jax.jit(functools.partial(both, blocks.attention))(q, k, v, g)
        for a, b in zip(jax.jit(functools.partial(both, fused))(q, k, v, g), expected):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.abs(a - b).max() < 0.02 * np.abs(b).max()
