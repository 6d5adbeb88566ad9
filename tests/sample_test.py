import json
import os
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, one_error
from numpy.testing import assert_array_equal
from PIL import Image

from dit_jax.diffusion.objectives import DDPM
from dit_jax.parallel import sharding
from dit_jax.runtime import images as images_
from dit_jax.runtime.errors import UserError
from dit_jax.sampling import output
from dit_jax.sampling.generator import Generator, Guide, Settings

FAST = ["--sampler=ddim", "--steps=4", "--cfg_scale=2"]


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    status, _, err = command("train", *TINY, "--config.steps=4", "--config.checkpoint.every=2", f"--workdir={workdir}")
    assert status == 0, err
    return workdir


def images(out):
    with np.load(out / "samples.npz") as file:
        assert file.files == ["arr_0"]
        return file["arr_0"]


def test_pictures_do_not_depend_on_batch_size_or_devices(network):
    """DDPM, guided, 20 steps of a network whose every parameter counts."""
    args, _, params, _ = network("a")
    args = dict(args, null_class=True)
    labels, results = np.arange(12) % 10, []
    for batch_size, devices, mesh in ((12, 1, {}), (5, 1, {}), (3, 4, {}), (8, 4, dict(data=1, fsdp=2, tensor=2))):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices], **mesh)
        generator = Generator(
            args,
            mesh,
            sharding.state_shardings(params, mesh),
            objective=DDPM(),
            settings=Settings(7, "ddpm", "20", 0.0, 1.5, 3),
            batch_size=batch_size,
        )
        results.append(generator(params, labels, np.arange(12)))
        # A part of the run alone, as after a restart.
        assert_array_equal(generator(params, labels[4:7], np.arange(4, 7)).shape, (3, 8, 8, 4))
        np.testing.assert_allclose(generator(params, labels[4:7], np.arange(4, 7)), results[-1][4:7], atol=2e-4)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=2e-4 * np.abs(results[0]).max())
    assert all(np.abs(results[0][0] - results[0][i]).mean() > 0.1 for i in range(1, 12))


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.5)])
def test_step_by_step_and_in_one_program_are_the_same(network, sampler, eta):
    """On a mesh; with a call after every step."""
    args, _, params, _ = network("a")
    args, mesh, seen = dict(args, null_class=True), sharding.make_mesh(data=1, fsdp=2, tensor=2), []
    settings = dict(objective=DDPM(), settings=Settings(7, sampler, "7", eta, 1.5, 3), batch_size=4)
    whole, steps = (
        Generator(args, mesh, sharding.state_shardings(params, mesh), **settings, on_step=on_step)(
            params, np.arange(5), np.arange(5)
        )
        for on_step in (None, seen.append)
    )
    np.testing.assert_allclose(steps, whole, atol=2e-4 * np.abs(whole).max())
    assert seen == list(range(1, 15))


def _sampled(network, whole, devices=1, **mesh):
    """(images, the sampler's program) of a guided bfloat16 network."""
    args, _, params, _ = network("a")
    args = dict(args, null_class=True, dtype=jnp.dtype(jnp.bfloat16))
    mesh = sharding.make_mesh(devices=jax.devices()[:devices], **mesh)
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    settings = Settings(7, "ddpm", "4", 0.0, 1.5, 3)
    split = sharding.shardings_of(params)
    generator = Generator(args, mesh, split, objective=DDPM(), settings=settings, batch_size=8, whole=whole)
    weights = generator.abstract_weights(params)
    generator.run = generator.run.lower(weights, generator.abstract_request()).compile()
    return generator(params, np.arange(12) % 10, np.arange(12)), generator.run.as_text()


def test_whole_weights_make_the_same_pictures_and_do_not_travel(network, monkeypatch):
    """Kernels that are cast ahead give the same bits; on a mesh nothing but the finished images is gathered."""
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)  # the network is small, and shall be split all the same
    one = _sampled(network, whole=False)[0]
    assert_array_equal(_sampled(network, whole=True)[0], one)
    split, with_gathers = _sampled(network, whole=False, devices=4, data=1, fsdp=2, tensor=2)
    whole, program = _sampled(network, whole=True, devices=4, data=1, fsdp=2, tensor=2)
    np.testing.assert_allclose(whole, one, atol=0.01 * np.abs(one).max())  # in bfloat16, 2 images a device and not 8
    np.testing.assert_allclose(split, one, atol=0.1 * np.abs(one).max())
    collectives = re.findall(r" = (\S+) (all-gather|all-reduce|all-to-all|collective-permute)\(", program)
    assert len(re.findall(r"all-gather|all-reduce", with_gathers)) > 10
    assert [shape.split("{")[0] for shape, _ in collectives] == ["f32[8,8,8,4]"], collectives


def test_whole_weights_of_a_network_and_its_guide(network):
    """Four devices, each with both networks, step by step; guided at some of the steps."""
    args, _, params, _ = network("a")
    args = dict(args, null_class=True, dtype=np.dtype(np.float32))
    second, results = jax.tree.map(lambda a: 0.9 * a, params), []
    settings = dict(objective=DDPM(), settings=Settings(7, "ddpm", "6", 0.0, 1.5, 3, "200,700"), batch_size=4)
    for whole, sizes in ((False, dict(devices=jax.devices()[:1])), (True, dict(data=2, fsdp=2))):
        mesh = sharding.make_mesh(**sizes)
        mine, others = (jax.device_put(tree, sharding.state_shardings(tree, mesh)) for tree in (params, second))
        split, guide = sharding.shardings_of(mine), Guide(args, others)
        generator = Generator(args, mesh, split, **settings, guide=guide, on_step=lambda step: None, whole=whole)
        results.append(generator(mine, np.arange(5), np.arange(5)))
    np.testing.assert_allclose(results[1], results[0], atol=2e-4 * np.abs(results[0]).max())


@pytest.mark.parametrize("ready", [True, False])
def test_the_devices_have_work_while_a_batch_is_saved(network, monkeypatch, ready):
    """What is ready comes at once. Else the next steps are started before a batch is waited for."""
    monkeypatch.setattr("dit_jax.sampling.generator._is_ready", lambda work: ready)
    args, _, params, _ = network("a")
    args = dict(args, null_class=True)
    mesh, finished, started = sharding.make_mesh(devices=jax.devices()[:1]), [], []
    settings = dict(objective=DDPM(), settings=Settings(7, "ddpm", "12", 0.0, 1.5, 3), batch_size=4)
    generator = Generator(args, mesh, sharding.state_shardings(params, mesh), **settings, on_step=finished.append)
    step = generator.step
    generator.step = lambda *arguments: started.append(0) or step(*arguments)
    seen = [
        (len(images), len(started), len(finished))
        for images, _ in generator.batches(params, np.arange(10), np.arange(10))
    ]
    ahead = 0 if ready else 8
    assert seen == [(4, 12 + ahead, 12), (4, 24 + ahead, 24), (2, 36, 36)]
    assert (generator.waited > 0) == ready and finished == list(range(1, 37))


def test_npz_grid_pngs_and_manifest(command, run, tmp_path):
    status, out, err = command(
        "sample", f"--workdir={run}", f"--out={tmp_path}", "--num=13", "--batch_size=5", "--classes=3,7", "--png", *FAST
    )
    assert status == 0, err
    array = images(tmp_path)
    assert array.shape == (13, 8, 8, 3) and array.dtype == np.uint8
    before = (tmp_path / "manifest.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["grid.png", "manifest.json", "png", "samples.npz"]
    for i in (0, 12):
        assert_array_equal(np.asarray(Image.open(tmp_path / f"png/{i:06d}.png")), array[i])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape[1] == 2 * 98 + 2 and 0 < grid.shape[0] - (7 * 98 + 2) < 30  # "3" and "7" above the columns
    assert_array_equal(grid[-98:-2:12, 2:98:12], array[12])
    # The strip can be asked for afterwards. It ends with the samples that are there.
    flags = f"--workdir={run}", f"--out={tmp_path}", "--num=13", "--batch_size=5", "--classes=3,7", "--strip", *FAST
    assert command("sample", *flags)[0] == 0
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    rows = [strip[2 + 98 * i : 98 + 98 * i, -(5 * 98) :] for i in range(4)]  # 4 evaluations: 5 moments
    assert strip.shape[0] == 4 * 98 + 2
    for i, row in enumerate(rows):
        moments = [row[::12, 98 * j : 98 * j + 96 : 12] for j in range(5)]
        assert_array_equal(moments[4], array[i])
        distances = [np.square(m.astype(float) - array[i]).sum() for m in moments]
        assert distances[0] > distances[1] > 0  # the noise, and what becomes of it
    assert (tmp_path / "manifest.json").read_bytes() == before and (images(tmp_path) == array).all()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["step"] == 4 and manifest["classes"] == "3,7" and manifest["which"] == "ema"
    one_error(
        command("sample", f"--workdir={run}", f"--out={tmp_path}", "--num=13", "--classes=3,8", *FAST),
        "classes ('3,7' there, '3,8' here)",
        "--out",
    )
    raw = tmp_path / "raw"
    assert (
        command(
            "sample", f"--workdir={run}", f"--out={raw}", "--num=13", "--which=raw", "--step=2", "--classes=3,7", *FAST
        )[0]
        == 0
    )
    assert (images(raw) != array).any()


@pytest.mark.slow
def test_killed_sampling_goes_on_with_the_same_pictures(command, run, tmp_path):
    flags = [f"--workdir={run}", "--num=400", *FAST]
    process = command("sample", *flags, f"--out={tmp_path}/a", "--batch_size=4", wait=False)
    parts = tmp_path / "a/parts"
    deadline = time.time() + 120
    while not parts.exists() or len([p for p in os.listdir(parts) if p.endswith(".npy")]) < 3:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "a/samples.npz").exists()
    status, out, err = command("sample", *flags, f"--out={tmp_path}/a", "--batch_size=64", devices=2)
    assert status == 0 and "resuming from image" in out, err
    assert command("sample", *flags, f"--out={tmp_path}/b", "--batch_size=100")[0] == 0
    difference = np.abs(images(tmp_path / "a").astype(int) - images(tmp_path / "b"))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_parts_are_what_they_say_or_made_again(tmp_path):
    images, settings = np.random.default_rng(0).integers(256, size=(8, 4, 4, 3), dtype=np.uint8), "settings"

    def parts(settings=settings):
        return output.Parts(str(tmp_path), settings, images.shape, images.dtype)

    def first(change):
        path = sorted((tmp_path / "parts").iterdir())[0]
        change(path)

    for change in (
        lambda p: p.rename(p.parent / p.name.replace("-2-", "-4-")),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"),
        os.remove,
        lambda p: (p.unlink(), p.mkdir()),
        lambda p: p.rename(p.parent / "000000000.npy"),
    ):
        made = parts()
        made.append(images[:2])
        made.append(images[2:4])
        assert parts().done == 4
        first(change)
        assert parts().done == 0 and not list((tmp_path / "parts").iterdir())
        shutil.rmtree(tmp_path / "damaged")
    parts().append(images)
    assert parts().done == 8 and parts("others").done == 0

    parts().append(images)
    npz = str(tmp_path / "samples.npz")
    parts().write_npz(npz, "arr_0")
    with open(npz, "rb") as f:
        data, digest = f.read(), output.sha256_of(npz)
    assert np.load(npz)["arr_0"].tobytes() == images.tobytes() and output.is_whole(
        npz, "arr_0", images.shape, np.uint8, digest
    )
    for i in range(len(data)):  # older ones, without a digest, are looked at by the zip file's own checksum
        with open(npz, "wb") as f:
            f.write(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        assert not output.is_whole(npz, "arr_0", images.shape, np.uint8, digest)


def test_weights_give_the_pictures_of_their_run(command, run, tmp_path):
    assert command("convert", f"--workdir={run}", f"--out={tmp_path}/w.npz")[0] == 0
    assert command("sample", f"--workdir={run}", f"--out={tmp_path}/a", "--num=6", *FAST)[0] == 0
    assert (
        command("sample", f"--weights={tmp_path}/w.npz", "--num_heads=4", f"--out={tmp_path}/b", "--num=6", *FAST)[0]
        == 0
    )
    assert_array_equal(images(tmp_path / "a"), images(tmp_path / "b"))


@pytest.mark.slow
def test_latents_are_written_as_they_are(command, network, tmp_path):
    from dit_jax.weights.files import write as write_weights

    write_weights(str(tmp_path / "a.npz"), network("a")[3])
    flags = [f"--weights={tmp_path}/a.npz", "--num_heads=4", f"--out={tmp_path}/out", "--num=3", *FAST]
    one_error(command("sample", *flags, "--png"), "--png", "latents")
    assert command("sample", *flags)[0] == 0
    with np.load(tmp_path / "out/samples.npz") as file:
        assert file["latents"].shape == (3, 8, 8, 4) and file["latents"].dtype == np.float32


def test_a_class_out_of_range(command, run, tmp_path):
    one_error(
        command("sample", f"--workdir={run}", f"--out={tmp_path}/out", "--num=2", *FAST, "--classes=3,10"),
        "--classes",
        "10",
        "0 to 9",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--steps=-4"], ["steps='-4'"]),
        (["--step=3"], ["--step=3", "2, 4"]),
        (["--workdir=/tmp/none"], ["/tmp/none"]),
        (["--num_heads=5"], ["--num_heads is of a weights file"]),
        (["--weights=x.pt"], ["--workdir", "--weights"]),
        (["--tensor=3"], ["mesh"]),
    ],
    ids=lambda v: v[0] if v and v[0].startswith("--") else "",
)
def test_bad_input_gets_one_line(command, run, tmp_path, flags, words):
    """What api_test.py has no argument for; the values of the others are checked by the same functions."""
    one_error(command("sample", f"--workdir={run}", f"--out={tmp_path}/out", "--num=2", *FAST, *flags), *words)


@pytest.mark.slow
def test_guidance_without_a_null_class_is_refused(command, tmp_path):
    assert (
        command("train", *TINY, "--config.steps=1", "--config.diffusion.label_dropout=0", f"--workdir={tmp_path}")[0]
        == 0
    )
    one_error(command("sample", f"--workdir={tmp_path}", "--num=2", *FAST), "cfg_scale=2.0", "null class")
    assert command("sample", f"--workdir={tmp_path}", "--num=2", "--cfg_scale=1", "--steps=2")[0] == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(eta=5.0), "eta=5.0"),
        (dict(eta=-1.0), "eta=-1.0"),
        (dict(cfg_scale=np.nan), "cfg_scale=nan"),
        (dict(cfg_channels=-1), "cfg_channels=-1"),
        (dict(steps="0"), "steps='0'"),
    ],
)
def test_settings_that_make_no_pictures_are_refused(network, change, words):
    args, _, params, _ = network("a")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    settings = Settings(**dict(steps="4", sampler="ddim", cfg_scale=1.5) | change)
    with pytest.raises(UserError, match=words):
        Generator(
            dict(args, null_class=True),
            mesh,
            sharding.state_shardings(params, mesh),
            objective=DDPM(),
            settings=settings,
            batch_size=2,
        )


@pytest.mark.slow
def test_a_file_that_is_not_whole_is_made_again(command, run, tmp_path):
    flags = [f"--workdir={run}", f"--out={tmp_path}", "--num=3", *FAST]
    assert command("sample", *flags)[0] == 0
    before = images(tmp_path)
    (tmp_path / "samples.npz").write_bytes((tmp_path / "samples.npz").read_bytes()[:200])
    (tmp_path / "grid.png").unlink()
    assert command("sample", *flags)[0] == 0
    assert_array_equal(images(tmp_path), before)
    assert (tmp_path / "grid.png").exists()
    (tmp_path / "manifest.json").write_text("{")
    one_error(command("sample", *flags), "manifest.json: is damaged")


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_any_number_of_channels_can_be_shown(channels):
    x = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, channels)).astype(np.float32)
    x[0] = np.nan
    shown = images_.to_uint8(x)
    assert shown.shape == (3, 4, 4, 3) and (shown[0] == 128).all() and shown[1].std() > 5
    assert images_.grid(shown, 2).shape[2] == 3


def test_uint8_is_truncated_as_published():
    x = np.array([-1.2, -1, -0.999, 0, 0.5, 0.9999, 1, 3], np.float32).reshape(-1, 1, 1, 1)
    assert_array_equal(
        images_.to_uint8(x)[:, 0, 0], np.repeat([[0], [0], [0], [128], [191], [255], [255], [255]], 3, 1)
    )
