"""The public Python API: the pictures of the commands, without a process, a flag or a compilation more."""

import json
import os
import shutil
import subprocess
import sys
import threading

import fake_hub
import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, one_error
from diffusers_test import ARGS, save_vae
from numpy.testing import assert_array_equal

import dit_jax
from dit_jax.models import dit
from dit_jax.sampling.model import choose_labels
from dit_jax.weights import diffusers as diffusers_layout, files, hub, load, published

FAST = dict(steps=4, sampler="ddim", cfg_scale=2.0, seed=3)
FLAGS = ("--steps=4", "--sampler=ddim", "--cfg_scale=2", "--seed=3")


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    """A run of a few steps of which the weights are not all zero."""
    workdir = tmp_path_factory.mktemp("api") / "run"
    status, _, err = command("train", *TINY, "--config.steps=3", "--config.ema_decay=0.5", f"--workdir={workdir}")
    assert status == 0, err
    return workdir


@pytest.fixture(scope="module")
def mesh():
    from dit_jax.parallel import sharding

    return sharding.make_mesh(devices=jax.devices()[:1])


def test_the_pictures_are_those_of_the_command(run, mesh, command, tmp_path):
    assert command("sample", f"--workdir={run}", f"--out={tmp_path}", "--num=5", "--classes=3,7", *FLAGS)[0] == 0
    expected = np.load(tmp_path / "samples.npz")["arr_0"]
    model = dit_jax.load(str(run), mesh=mesh)
    images = model.sample(classes=[3, 7], num=5, **FAST, progress=False)
    assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 3)
    assert_array_equal(images, expected)
    assert_array_equal(model.sample("3,7", 5, **FAST, progress=False), expected)
    picture = dit_jax.grid(images)
    assert picture.mode == "RGB" and picture.size == (3 * 98 + 2, 2 * 98 + 2)
    named = dit_jax.grid(images[:4], 2, ["three", 7, "three", 7])
    assert np.asarray(named).tobytes() != np.asarray(dit_jax.grid(images[:4], 2, ["three", 8, "three", 8])).tobytes()
    assert_array_equal(np.asarray(named)[-2 * 98 - 2 :], np.asarray(dit_jax.grid(images[:4], 2)))
    assert model.config["model"]["depth"] == 2 and model.origin["step"] == 3 and model.class_names is None


def test_a_second_call_compiles_nothing(run, mesh, compilations):
    model = dit_jax.load(str(run), mesh=mesh)
    first = model.sample([1], 6, **FAST, progress=False)
    assert compilations
    compilations.clear()
    other = model.sample("random", 3, **FAST | {"seed": 5, "cfg_scale": 3.5}, progress=False)
    more = model.sample("balanced", 13, **FAST, batch_size=6, progress=False)
    assert not compilations and len(other) == 3 and len(more) == 13
    assert_array_equal(model.sample([1], 6, **FAST, progress=False), first)
    assert not compilations
    assert np.abs(model.sample([1], 6, **FAST | {"cfg_scale": 5.0}, progress=False).astype(int) - first).max() > 0


def test_what_was_used_last_stays_compiled(run, mesh):
    """And no more, as a server that is asked for many settings would fill the memory."""
    from dit_jax.sampling.generator import Settings
    from dit_jax.sampling.model import GENERATORS

    model = dit_jax.load(str(run), mesh=mesh)
    made = [model.generator(Settings(steps=str(n), sampler="ddim"), 2) for n in range(1, GENERATORS + 1)]
    assert model.generator(made[0].settings, 1) is made[0]
    newest = model.generator(Settings(steps="99", sampler="ddim"), 2)
    assert model.generator(made[0].settings, 2) is made[0]
    assert set(model._generators) == {*made, newest} - {made[1]}


def test_a_sample_can_be_watched_from_the_noise_to_the_end(run, mesh, compilations):
    model = dit_jax.load(str(run), mesh=mesh)
    samples = model.sample([1, 2], 2, **FAST, progress=False)
    times, images = zip(*model.watch([1, 2], 2, moments=3, **FAST, progress=False))
    assert times == (0, 2, 4)
    noise = [jax.random.fold_in(jax.random.fold_in(jax.random.key(FAST["seed"]), i), FAST["steps"]) for i in range(2)]
    noise = [jax.random.normal(key, (8, 8, 1)) for key in noise]
    assert_array_equal(images[0], dit_jax.runtime.images.to_uint8(np.stack(noise)))
    assert_array_equal(images[-1], samples)
    assert len({array.tobytes() for array in images}) == 3
    compilations.clear()
    assert [time for time, _ in model.watch([3, 4], 2, moments=99, **FAST | {"seed": 5}, progress=False)] == [*range(5)]
    assert not compilations
    with pytest.raises(dit_jax.UserError, match="moments=1"):
        model.watch([1], 1, moments=1)


def test_batches_fill_the_devices(run):
    """A batch that the devices do not divide is rounded up, and used whole."""
    from dit_jax.parallel import sharding
    from dit_jax.sampling.generator import Settings

    model = dit_jax.load(str(run), mesh=sharding.make_mesh())  # 4 devices
    settings = Settings(steps="2", sampler="ddim")
    batches = list(model.batches(np.arange(10), settings, 3, progress=False))
    assert list(map(len, batches)) == [4, 4, 2]


def test_the_network_is_a_function(run, mesh):
    model = dit_jax.load(str(run), mesh=mesh)
    x, t, y = np.ones((2, 8, 8, 1), np.float32), np.array([1, 999]), np.array([0, 10])
    out = model(x, t, y)
    assert out.shape == (2, 8, 8, 2)
    assert_array_equal(jax.jit(model.apply)(model.params, x, t, y).shape, out.shape)
    for one_t, one_y, name in ((1, y, "t"), (t, 2, "y"), (t, y[:1], "y")):
        with pytest.raises(dit_jax.UserError, match=rf"{name}: \(.*\): must be \(2,\), one for each image"):
            model(x, one_t, one_y)
    grads = jax.grad(lambda params: model.apply(params, x, t, y).sum())(model.params)
    assert jax.tree.structure(grads) == jax.tree.structure(model.params)


def test_every_kind_of_weights_makes_the_same_pictures(run, mesh, command, tmp_path):
    expected = dit_jax.load(str(run), mesh=mesh).sample(num=4, **FAST, progress=False)
    for name in ("w.pt", "w.npz", "w.safetensors"):
        assert command("convert", f"--workdir={run}", f"--out={tmp_path}/{name}")[0] == 0
        model = dit_jax.load(str(tmp_path / name), num_heads=4, mesh=mesh)
        assert_array_equal(model.sample(num=4, **FAST, progress=False), expected, err_msg=name)
        with pytest.raises(dit_jax.UserError, match="--num_heads must say"):
            dit_jax.load(str(tmp_path / name), mesh=mesh)


@pytest.mark.parametrize("arguments, words", [
    (dict(classes=[10]), "10 is no class"), (dict(classes=["cat"]), "'balanced', 'random' or numbers"),
    (dict(num=0), "num=0: must be a whole number of at least 1"), (dict(steps="x"), "steps='x'"), (dict(steps=0), "steps='0'"), (dict(steps=1001), "steps='1001'"), (dict(classes=[-1]), "-1 is no class"), (dict(sampler="x"), "unknown sampler"),
    (dict(cfg_scale=-1.0), "cfg_scale=-1.0"), (dict(seed=-1), "seed=-1"), (dict(classes=[]), "classes"), (dict(num="4"), "num=4: must be a whole number"), (dict(batch_size=2.5), "batch_size=2.5"),
    (dict(classes=[3.7]), "3.7"), (dict(classes=None), "classes"), (dict(classes="random", seed=-1), "seed=-1"), (dict(seed=1.5), "seed=1.5"), (dict(cfg_scale="2"), "cfg_scale='2'")])  # fmt: skip
def test_errors_are_exceptions_of_one_line(arguments, words, run, mesh):
    model = dit_jax.load(str(run), mesh=mesh)
    with pytest.raises(dit_jax.UserError, match=words) as e:
        model.sample(**FAST | arguments, progress=False)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "where, more, words",
    [
        ("/nowhere", {}, "no such file or folder.*DiT-XL/2-256"),
        ("gs://bucket/run", {}, "where='gs://bucket/run'.*mount the bucket"),
        (" ", {}, "where"),
        ("", {}, "where is empty"),
        (3, {}, "where=3"),
        (None, {}, "where=None: must be text or a path"),
        ("EMPTY", {}, "holds no checkpoints: name the directory of a run"),
        ("RUN", {"mesh": 3}, "mesh: a int"),
        ("RUN", {"vae": 3}, "vae=3: must be text or a path"),
        ("RUN", {"num_heads": 5}, "num_heads=5: is for a weights file"),
        ("RUN", {"num_classes": 11}, "num_classes=11: is for a weights file"),
        ("RUN", {"which": "foo"}, "which='foo'"),
        ("RUN", {"step": 99}, "--step=99"),
        ("/dev/null", {"step": 3}, "step=3"),
    ],
)
def test_what_cannot_be_loaded(where, more, words, run, mesh, tmp_path):
    where = {"RUN": run, "EMPTY": tmp_path}.get(where, where)
    with pytest.raises(dit_jax.UserError, match=words) as e:
        dit_jax.load(where, **{"mesh": mesh} | more)
    assert "\n" not in str(e.value)


def test_what_cannot_be_trained(tmp_path):
    (tmp_path / "file").write_text("")
    for config, workdir, words in (
        ({}, tmp_path / "a", "config: a dict"),
        (dit_jax.paper_config(), tmp_path / "file", "workdir=.*cannot be written"),
        (dit_jax.paper_config(), "", "workdir is empty"),
    ):
        with pytest.raises(dit_jax.UserError, match=words):
            dit_jax.fit(config, workdir)
    with pytest.raises(dit_jax.UserError, match=r"data: must be \(images, labels\)"):
        dit_jax.fit(dit_jax.paper_config(), tmp_path / "a", data=(np.zeros((4, 8, 8, 3), np.uint8),))


@pytest.mark.parametrize(
    "shape, columns, words",
    [
        ((8, 8, 3), None, r"images: uint8 \(8, 8, 3\): must be"),
        ((4, 8, 8), None, "images: uint8"),
        ((4, 8, 8, 4), None, "images: uint8"),
        ((0, 8, 8, 3), None, "images: uint8"),
        ((4, 8, 8, 3), 2.5, "columns=2.5: must be a whole number"),
        ((4, 8, 8, 3), 0, "columns=0"),
    ],
)
def test_what_is_no_grid(shape, columns, words):
    with pytest.raises(dit_jax.UserError, match=words):
        dit_jax.grid(np.zeros(shape, np.uint8), columns)
    for labels in ("abcd", ["a"] * 3, 3, [["a"]] * 4):
        with pytest.raises(dit_jax.UserError, match="labels: must be a list .* of the 4 images"):
            dit_jax.grid(np.zeros((4, 8, 8, 3), np.uint8), 2, labels)


def test_a_number_is_a_number_also_where_names_are_numbers():
    names = sorted(map(str, range(12)))  # class folders 0 to 11: ["0", "1", "10", "11", "2", ...]
    assert list(choose_labels([3, "4"], 2, 12, 0, names)) == [3, 4]
    assert list(choose_labels("3,4", 2, 12, 0, names)) == [3, 4]
    imagenet = ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert list(choose_labels(["Carassius auratus", "tench", imagenet[1]], 3, 2, 0, imagenet)) == [1, 0, 1]


@pytest.mark.slow
def test_an_interrupted_fit_leaves_nothing_running(tmp_path, monkeypatch):
    from dit_jax.training.reports import Reports

    def interrupted(self, step):
        raise KeyboardInterrupt

    config = dit_jax.paper_config(model="")
    model = dict(patch_size=2, depth=1, hidden_size=32, num_heads=2, input_size=8, in_channels=1, num_classes=10)
    config.update(dict(steps=20, batch_size=8, log_every=10, model=model))
    config.update(dict(sample=dict(every=0), checkpoint=dict(every=5), data=dict(source="digits", flip=False)))
    before, dispatch = threading.active_count(), jax.config.values["jax_cpu_enable_async_dispatch"]
    with monkeypatch.context() as patch:
        patch.setattr(Reports, "log", lambda self, step, batches: interrupted(self, step))
        with pytest.raises(KeyboardInterrupt):
            dit_jax.fit(config, tmp_path / "run")
    assert jax.config.values["jax_cpu_enable_async_dispatch"] == dispatch
    assert not (tmp_path / "run/.dit_jax.lock").exists()
    assert (tmp_path / "run/checkpoints/5").is_dir()  # whole, although it was being written
    assert threading.active_count() <= before + 2
    assert dit_jax.fit(config, tmp_path / "run").origin["step"] == 20


def test_no_public_name_is_a_module():
    for name in dit_jax.__all__:
        assert not (ROOT / "dit_jax" / f"{name}.py").exists(), name


def test_latents_are_decoded_or_not(mesh, tmp_path):
    args, rng = ARGS | {"null_class": True}, np.random.default_rng(0)
    flat = {name: rng.normal(0, 0.05, s).astype(np.float32) for name, s in published.published_shapes(args).items()}
    files.write(str(tmp_path / "w.npz"), flat)
    save_vae(tmp_path / "vae")
    model = dit_jax.load(str(tmp_path / "w.npz"), num_heads=2, vae=str(tmp_path / "vae"), mesh=mesh)
    pictures = model.sample(num=3, **FAST, progress=False)
    assert pictures.dtype == np.uint8 and pictures.shape == (3, 16, 16, 3) and model.shape == (16, 16, 3)
    latents = model.sample(num=3, **FAST, latents=True, progress=False)
    assert latents.dtype == np.float32 and latents.shape == (3, 8, 8, 4)
    without = dit_jax.load(str(tmp_path / "w.npz"), num_heads=2, mesh=mesh)
    assert without.latent
    assert_array_equal(without.sample(num=3, **FAST, progress=False), latents)
    assert_array_equal(model.decode(latents), pictures)


def test_fit_trains_resumes_and_equals_the_command(command, run, tmp_path):
    config = dit_jax.paper_config(model="")
    config.model.update(
        dict(patch_size=2, depth=1, hidden_size=32, num_heads=2, input_size=8, in_channels=3, num_classes=4)
    )
    config.update(dict(steps=4, batch_size=8, log_every=1))
    config.mesh.data, config.sample.every, config.checkpoint.every = 4, 0, 2
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(20, 8, 8, 3), dtype=np.uint8), rng.integers(4, size=20)
    logged = []
    whole = dit_jax.fit(config, str(tmp_path / "whole"), data=(images, labels), on_log=logged.append)
    assert [[record["step"] for record in records] for records in logged] == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert logged[-1] == list(map(json.loads, (tmp_path / "whole/metrics.jsonl").read_text().splitlines()))
    config.steps = 2
    dit_jax.fit(config, str(tmp_path / "parts"), data=(images, labels))
    config.steps = 4
    parts = dit_jax.fit(config, str(tmp_path / "parts"), data=(images, labels))
    jax.tree.map(assert_array_equal, parts.params, whole.params)
    dit_jax.fit(config, str(tmp_path / "parts"), data=(images, labels.astype(np.int32)))  # the same data
    with pytest.raises(dit_jax.UserError, match="another run.*the data"):
        dit_jax.fit(config, str(tmp_path / "parts"), data=(images[::-1], labels))
    with pytest.raises(dit_jax.UserError, match="data: labels.*one integer for each"):
        dit_jax.fit(config, str(tmp_path / "other"), data=(images, labels[:3]))
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    config.data.update(dict(source="arrays", path=str(tmp_path)))
    folder = dit_jax.fit(config, str(tmp_path / "folder"))
    jax.tree.map(assert_array_equal, folder.params, whole.params)


@pytest.mark.slow
def test_published_names_are_fetched_once(mesh, tmp_path, monkeypatch, command):
    """The authors' file and the hub's folder, of a small network under their names."""
    rng, args = np.random.default_rng(0), ARGS
    flat = {name: rng.normal(0, 0.05, s).astype(np.float32) for name, s in published.published_shapes(args).items()}
    grid = args["input_size"] // args["patch_size"]
    flat["pos_embed"] = dit.position_embedding(args["hidden_size"], grid)[None]
    files.write(str(tmp_path / "w.pt"), flat)
    folder = tmp_path / "folder"
    diffusers_layout.save(str(folder), flat, args, None)
    save_vae(folder / "vae")
    names = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    server = fake_hub.Hub(
        {"facebook/DiT-XL-2-256": names, "files": {"DiT-XL-2-256x256.pt": (tmp_path / "w.pt").read_bytes()}}
    )
    server.use(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(hub, "AUTHORS", f"{server.url}/")
    monkeypatch.setattr(load, "VAE", "")
    try:
        pictures = []
        for name, more in (("facebook/DiT-XL-2-256", {}), ("DiT-XL/2-256", dict(num_heads=2, vae=str(folder / "vae")))):
            server.served.clear()
            server.fault = "cut"
            monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
            with pytest.raises(dit_jax.UserError, match="cannot be fetched.*run again to resume"):
                dit_jax.load(name, mesh=mesh, **more)
            server.fault = None
            pictures.append(dit_jax.load(name, mesh=mesh, **more).sample(num=2, **FAST, progress=False))
            weights = [path for path in server.served if path.endswith((".pt", ".safetensors"))]
            server.served.clear()
            again = dit_jax.load(name, mesh=mesh, **more).sample(num=2, **FAST, progress=False)
            assert_array_equal(again, pictures[-1])
            assert weights and not any(path.endswith((".pt", ".safetensors")) for path in server.served)
        assert_array_equal(*pictures)
    finally:
        server.close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))
    with pytest.raises(dit_jax.UserError, match="DiT-XL-2-512x512.pt and put it at .*nothing"):
        dit_jax.load("DiT-XL/2-512", mesh=mesh)


def test_nothing_of_the_process_stays_changed(run, tmp_path):
    """Loading a run, a damaged checkpoint, and a name that cannot be fetched. What other libraries change when they are
    imported is theirs."""
    shutil.copytree(run, tmp_path / "damaged")
    for path in (tmp_path / "damaged/checkpoints/3/ema").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    code = """
import gc, logging, os, signal, sys, warnings
import huggingface_hub.file_download, jax, orbax.checkpoint, PIL.Image, scipy.special
def state():
    loggers = [logging.getLogger(name).level for name in (None, "asyncio", "absl", "huggingface_hub")]
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return sys.unraisablehook, loggers, handlers, list(warnings.filters), sys.argv[:], dict(os.environ)
before = state()
import dit_jax, dit_jax.data.decode
run, damaged = sys.argv[1:]
dit_jax.load(run)
for where in (damaged, "facebook/DiT-XL-2-256"):
    try:
        dit_jax.load(where)
    except dit_jax.UserError as e:
        print(e)
gc.collect()
assert not [pair for pair in zip(before, state()) if pair[0] != pair[1]]
"""
    more = {
        "JAX_PLATFORMS": "cpu",
        "HF_ENDPOINT": "http://localhost:9",
        "XDG_CACHE_HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), str(tmp_path / "damaged")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | more,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "no checkpoint can be read" in done.stdout and "cannot be fetched" in done.stdout


def test_importing_is_quick_and_leaves_no_flags():
    code = (
        "import sys, dit_jax; assert 'jax' not in sys.modules; dit_jax.load; from absl import flags; "
        "assert {*dit_jax.__all__, '__version__'} <= {*dir(dit_jax)}; "
        "assert not flags.FLAGS.is_parsed() and 'workdir' not in flags.FLAGS; print(sorted(dit_jax.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "load" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples(path, tmp_path):
    assert len(path.read_text().splitlines()) < 40
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    if path.stem == "own_network":
        mean, deviation = (float(word.strip(",")) for word in done.stdout.split() if word.startswith("0."))
        assert abs(mean - 0.5) < 0.02 and abs(deviation - 0.1) < 0.02
    if path.stem == "own_loop":
        assert float(done.stdout.split()[-1]) < 0.4
    if path.stem == "own_data":
        assert (tmp_path / "runs/squares/grid.png").exists()
    if path.stem == "shapes":
        assert [len(list((tmp_path / "pictures" / n).iterdir())) for n in ("circle", "square", "triangle")] == [100] * 3


def test_renamed_commands_answer_with_the_new_name(command):
    for old, new in (("benchmark", "benchmarks.speed"), ("reproduce", "benchmarks.miniature")):
        one_error(command(old, "--out=x"), new)
