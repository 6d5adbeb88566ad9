import io
import json
import os
import re
import tarfile
from pathlib import Path

# Without LLVM's optimizations programs compile in half the time; golden_test.py runs once with them.
COMPILED = os.environ.get("DIT_JAX_COMPILED", "--xla_backend_optimization_level=0")
# Four fake devices, and one step in flight at a time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 {COMPILED}"
os.environ["PJRT_NPROC"] = "16"  # see dit_jax.runtime.process.enough_threads
# Two processes test side by side: threads of NumPy and PyTorch beside these would wait for each other.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
# Both, the commands they start and later tests share what XLA has compiled.
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}

from dit_jax.runtime.process import accelerator_attached

if accelerator_attached():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the fake devices; tests/gpu_test.py has processes of its own

import forked
import jax
import numpy as np
import pytest

from dit_jax.runtime import process
from dit_jax.runtime.files import write_aside

jax.config.update("jax_cpu_enable_async_dispatch", False)

# Arrays computed with the published PyTorch code; another folder of the same kind may be named.
GOLDEN = Path(os.environ.get("DIT_JAX_GOLDEN", Path(__file__).parent / "golden"))


def pytest_collection_modifyitems(items):
    """The longest test first: begun last, it would run on while the other process has nothing left to do."""
    items.sort(key=lambda item: "fresh_clone" not in item.name)


def nhwc(a):
    """Golden images are N, C, H, W (also behind further leading axes)."""
    return np.moveaxis(np.asarray(a), -3, -1)


@pytest.fixture(scope="session")
def golden():
    return lambda name: np.load(GOLDEN / "dit" / name)


@pytest.fixture(scope="session")
def network(golden):
    """network("a") -> (arguments of DiT, graphdef, params, the published arrays)."""
    from dit_jax.models import dit
    from dit_jax.weights import files as weight_files, published

    def load(which):
        args = json.loads(str(golden(f"dit_{which}_forward.npz")["geometry"]))
        npz, pt = (GOLDEN / "dit" / f"dit_{which}{end}" for end in ("_weights.npz", ".pt"))
        flat = dict(weight_files.read(str(npz if npz.exists() else pt)))
        return args, dit.abstract(**args)[0], published.from_published(flat, args), flat

    return load


ROOT = Path(__file__).parent.parent
# Of the slow tests those that cost minutes and say little that others do not.
long = pytest.mark.skipif(not os.environ.get("DIT_JAX_LONG"), reason="takes minutes; DIT_JAX_LONG=1 runs it")
TINY = [
    "--config=configs/digits.py",
    "--config.batch_size=8",
    "--config.model.depth=2",
    "--config.model.hidden_size=32",
    "--config.log_every=1",
    "--config.sample.every=0",
    "--config.judge.samples=0",
    "--config.checkpoint.keep=0",
]


# Run before a command: in the place of Inception a network of a few numbers, with weights.
TOY = """
import numpy as np
from dit_jax.evaluation import features
def toy(path):
    w = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    def apply(params, x):
        x = x.astype(np.float32) / 255
        pool = x[:, :3, :3].mean(-1).reshape(-1, 9) @ params["w"]
        return features.Rows(pool, x[:, 0, 0, :2], x[:, :2, :2, 0].reshape(-1, 4))
    return features.Extractor("FID", apply, {"w": w}, "0" * 64)
features.load_inception = toy
"""


def start(name, *flags, devices=1, code="", argv=(), cwd=ROOT, **env):
    """python -m dit_jax.name *flags, started. devices: how many fake ones. code: what is run before it, with argv in front
    of the flags, which it is to take away. cwd: a folder with the package."""
    env = (
        os.environ
        | env
        | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {COMPILED}",
            "GLIBC_TUNABLES": process.MALLOC,
        }
    )
    run = f"import runpy\n{code}\nrunpy.run_module('dit_jax.{name}', run_name='__main__', alter_sys=True)"
    return forked.Forked(run, [str(flag) for flag in (*argv, *flags)], str(cwd), env)


@pytest.fixture(scope="session")
def command():
    """command("train", *flags) runs python -m dit_jax.train -> (exit status, stdout, stderr). With wait=False: the process,
    started. code: run before it."""

    def run(name, *flags, wait=True, devices=1, code=""):
        process = start(name, *flags, devices=devices, code=code)
        if not wait:
            return process
        out, err = process.communicate(timeout=500)
        return process.returncode, out, err

    return run


def records(workdir):
    with open(workdir / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def losses(workdir):
    return {r["step"]: r["loss"] for r in records(workdir) if "loss" in r}


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of InceptionV3's weights with drawn numbers, those of the golden features."""
    from inception_test import SHAPES, drawn

    path = tmp_path_factory.mktemp("inception") / "weights.npz"
    np.savez(path, **{name: drawn(name) for name in SHAPES if not name.endswith("num_batches_tracked")})
    return path


@pytest.fixture(scope="session")
def picture_folders(tmp_path_factory):
    """A folder of class folders of pictures of 8 x 8, one of which is broken."""
    from dit_jax.runtime import images as images_

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(9):
        picture = images_.png(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
        write_aside(str(folder / "ab"[i % 2] / f"{i}.png"), picture[:50] if i == 4 else picture)
    return folder


@pytest.fixture(scope="session")
def uninterrupted(command, tmp_path_factory):
    """The workdir of a run of 24 steps, of one process on one device."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    status, out, err = command(
        "train", *TINY, "--config.steps=24", "--config.checkpoint.every=4", f"--workdir={workdir}"
    )
    assert status == 0, err
    assert sorted(losses(workdir)) == list(range(1, 25))
    return workdir


@pytest.fixture
def compilations():
    """A list that grows with every program that is compiled."""
    found = []

    def listen(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def one_error(result, *words):
    """The command failed with exactly one line on stderr, which holds `words`."""
    status, _, err = result
    waiting = re.compile(r".* \(\d+ (s|min \d+ s)\)")  # what a command says where nothing else is printed for long
    lines = [line for line in err.splitlines() if line.strip() and not waiting.fullmatch(line)]
    assert status == 1 and len(lines) == 1 and lines[0].startswith("error: "), err
    for word in words:
        assert str(word) in lines[0], lines[0]


def tar(files):
    """{name: bytes} -> the bytes of a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def save_vae(path, seed, block_out_channels=(8, 8, 16, 16), scale=0.18215):
    """A small VAE of the published format with random weights, in the folder `path`, which is returned."""
    from dit_jax.vae import files as vae_files, network

    args = dict(
        block_out_channels=block_out_channels, layers_per_block=1, latent_channels=4, norm_num_groups=4, in_channels=3
    )
    rng = np.random.default_rng(seed)
    vae_files.save(
        str(path),
        args,
        jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape).astype(np.float32), network.abstract(**args)[1]),
        scale,
    )
    return path


def write_cache(path, count, mean=None, std=None, classes=10, scale=0.18215, encoder="noise"):
    """A latent cache of two shards, of float32 posteriors (count, 2, 8, 8, 4), by default normal noise."""
    from dit_jax.data import latents

    rng, half = np.random.default_rng(0), count // 2
    mean = rng.standard_normal((count, 2, 8, 8, 4), np.float32) if mean is None else mean
    std = 0.1 * rng.random((count, 2, 8, 8, 4), np.float32) if std is None else std
    posteriors, labels, shards = np.concatenate([mean, std], axis=-1), np.arange(count) % classes, []
    os.makedirs(path)
    for i, rows in enumerate((slice(half), slice(half, count))):
        writer = latents.ShardWriter(path, latents.shard_name(i, 2), "float32")
        writer.add(posteriors[rows], labels[rows])
        shards.append(writer.close())
    latents.write_manifest(
        path,
        {
            "format": latents.FORMAT,
            "shards": shards,
            "count": count,
            "num_classes": classes,
            "class_names": None,
            "size": 64,
            "shape": [8, 8, 4],
            "dtype": "float32",
            "skipped": [],
            "vae": {"name": encoder, "encoder": encoder, "decoder": encoder, "sha256": encoder, "scale": scale},
        },
    )
