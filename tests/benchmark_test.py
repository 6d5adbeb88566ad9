"""python -m benchmarks.speed, and that what it times of PyTorch is the same function as dit_jax's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from unittest import mock

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, long, nhwc, one_error, save_vae
from flax import nnx
from numpy.testing import assert_allclose

from benchmarks.machine import cores
from benchmarks.speed import evaluation, page, parts, profile
from benchmarks.speed.child import Child
from dit_jax import config as configs
from dit_jax.diffusion import ddpm, samplers
from dit_jax.diffusion.guidance import guide
from dit_jax.diffusion.process import linear_schedule, respace
from dit_jax.runtime import files
from dit_jax.runtime.process import MALLOC
from dit_jax.training.accumulate import gradient
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.step import TrainState, update
from dit_jax.weights import published

ARGS = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=5)
FULL = linear_schedule(1000)
RECIPE = dict(learning_rate=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)


def run_command(module, *flags, wait=True, code=""):
    """Runs python -m module *flags, as conftest's `command` runs those of the package: (exit status, stdout, stderr).

    With wait=False it returns the process, started. code: run before it.
    """
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "GLIBC_TUNABLES": MALLOC}
    code = f"import runpy\n{code}\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    process = forked.Forked(code, list(map(str, flags)), str(ROOT), env)
    if not wait:
        return process
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def speed(*flags, **settings):
    return run_command("benchmarks.speed", *flags, **settings)


def nchw(a):
    return np.ascontiguousarray(np.moveaxis(np.asarray(a), -1, -3))


def published_names(depth):
    """Returns {diffusers' name: published name}, without qkv."""
    names = {
        "net.pos_embed.proj": "x_embedder.proj",
        "net.proj_out_1": "final_layer.adaLN_modulation.1",
        "net.proj_out_2": "final_layer.linear",
        "embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    }
    for i in range(depth):
        for in_diffusers, known in (
            ("norm1.linear", "adaLN_modulation.1"),
            ("attn1.to_out.0", "attn.proj"),
            ("ff.net.0.proj", "mlp.fc1"),
            ("ff.net.2", "mlp.fc2"),
        ):
            names[f"net.transformer_blocks.{i}.{in_diffusers}"] = f"blocks.{i}.{known}"
    leaves = {
        f"{in_diffusers}.{leaf}": f"{known}.{leaf}"
        for in_diffusers, known in names.items()
        for leaf in ("weight", "bias")
    }
    return leaves | {"embed.class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight"}


def to_pytorch_side(flat, depth):
    """Returns published arrays as a state dict of pytorch_side.DiT."""
    state = {in_diffusers: flat[known] for in_diffusers, known in published_names(depth).items()}
    for i in range(depth):
        for leaf in ("weight", "bias"):
            for name, part in zip("qkv", np.split(flat[f"blocks.{i}.attn.qkv.{leaf}"], 3)):
                state[f"net.transformer_blocks.{i}.attn1.to_{name}.{leaf}"] = part
    return state


@pytest.fixture(params=["diffusers", "pytorch"])
def both(request):
    """(graphdef, params, PyTorch's trainer with the same weights, its names of published arrays)."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from benchmarks.speed.pytorch_side import Trainer, Way
    from dit_jax.models import dit

    plain = request.param == "pytorch"
    names = (lambda flat: flat) if plain else partial(to_pytorch_side, depth=ARGS["depth"])
    graphdef, shapes = dit.abstract(**ARGS)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), shapes)
    params["pos_embed"] = dit.position_embedding(ARGS["hidden_size"], 4)
    settings = dict(batch_size=4, timesteps=1000, label_dropout=0.1, optimizer=RECIPE, ema_decay=0.9)
    trainer = Trainer(ARGS, **settings, way=Way(plain))
    state = {name: torch.tensor(a) for name, a in names(published.to_published(params, ARGS)).items()}
    trainer.model.load_state_dict(state, strict=True)
    trainer.ema = [p.detach().clone() for p in trainer.params]
    return graphdef, params, trainer, names


def test_pytorch_denoises_the_same(both):
    import torch

    from benchmarks.speed.pytorch_side import Diffusion

    graphdef, params, trainer, _ = both
    rng = np.random.default_rng(1)
    x, noise = rng.standard_normal((2, 3, 8, 8, 4), np.float32)
    y, schedule = np.array([0, 3, 4, 5, 5, 5]), respace(FULL, "10")
    model = lambda x, t, y: nnx.merge(graphdef, params)(x, t, y)
    for i in (7, 0):
        t = np.full(3, i)
        out = guide(model, y[:3], 5, 4.0)(x, schedule.timestep_map[t])
        of_jax = samplers.ddpm_step(schedule, out, x, jnp.asarray(t), noise)
        with torch.inference_mode():
            of_pytorch = Diffusion(schedule).guided_step(
                trainer.model, *(torch.tensor(a) for a in (nchw(x), nchw(noise), y, t)), 4.0, 3
            )
        assert np.abs(of_jax - x).max() > 0.05
        assert_allclose(of_jax, nhwc(of_pytorch), rtol=1e-4, atol=1e-4 * np.abs(of_jax).max())


@pytest.mark.slow
def test_pytorch_trains_the_same(both):
    """Losses, and after two steps of AdamW with decay the parameters and their EMA. A timestep is 0, where the bound is
    the discretised likelihood."""
    import torch

    graphdef, params, trainer, as_pytorch = both
    optimizer, rng = make_optimizer(**RECIPE), np.random.default_rng(2)
    state = TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))
    for _ in range(2):
        x, noise = rng.standard_normal((2, 4, 8, 8, 4), np.float32)
        t, y = np.array([0, 1, 500, 999]), np.array([0, 2, 4, 5])

        def loss_fn(params, _):
            model = nnx.merge(graphdef, params)
            losses = ddpm.training_losses(FULL, lambda x, t: model(x, t, y), x, t, noise)
            return losses["loss"].mean(), losses

        losses = trainer.diffusion.losses(trainer.model, *(torch.tensor(a) for a in (nchw(x), t, nchw(noise), y)))
        state, of_jax = jax.jit(lambda s: update(s, *gradient(loss_fn, s.params, ()), optimizer, 0.9))(state)
        assert_allclose(of_jax["loss"], losses.detach(), rtol=2e-4)
        value = trainer.update(*(torch.tensor(a) for a in (nchw(x), t, nchw(noise), y)))["value"]
        assert_allclose(value, of_jax["loss"].mean(), rtol=2e-4)
    names = [name for name, _ in trainer.model.named_parameters()]
    for tree, arrays in ((state.params, trainer.params), (state.ema, trainer.ema)):
        wanted = as_pytorch(published.to_published(tree, ARGS))
        assert set(wanted) - {"pos_embed"} == set(names)
        for name, array in zip(names, arrays):
            if name.endswith("to_k.bias"):  # softmax does not see it: its gradient is rounding
                continue
            if name.endswith("qkv.bias"):  # as of the keys' third
                q, _, v = np.split(np.arange(len(array)), 3)
                wanted[name], array = wanted[name][[*q, *v]], array[[*q, *v]]
            # Adam divides by the gradient's size: where a gradient is nearly 0, its rounding shows.
            assert np.quantile(np.abs(wanted[name] - array.detach().numpy()), 0.99) < 2e-5, name


def test_pytorch_starts_of_its_own_format(tmp_path):
    pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from benchmarks.speed import pytorch_side

    pytorch_side.make_weights({"model": ARGS}, str(tmp_path / "weights"))
    pytorch_side.first_picture(str(tmp_path / "weights"), 2, 1)  # which looks whether it is finite


@pytest.mark.slow
def test_nothing_of_jax_in_pytorchs_process():
    pytest.importorskip("torch"), pytest.importorskip("diffusers")
    code = "import sys, benchmarks.speed.pytorch_side; assert 'torch' in sys.modules and 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_committed_page_is_that_of_its_numbers():
    report = json.loads((ROOT / "benchmarks" / "report.json").read_text())
    text = page.page(report["parts"], page.targets(report["parts"]), report["machine"], True)
    assert text.split() == (ROOT / "benchmarks" / "benchmarks.md").read_text().split()
    assert page.targets(report["parts"]) == report["targets"]


@pytest.mark.parametrize("name, module", [("benchmark", "speed"), ("reproduce", "miniature")])
def test_the_old_names_say_the_new_ones(command, name, module):
    one_error(command(name, "--x=y"), f"dit_jax.{name} is now python -m benchmarks.{module}, run from a checkout")


TINY = [
    "--config=configs/digits.py",
    "--config.batch_size=8",
    "--config.model.depth=2",
    "--config.model.hidden_size=32",
    "--config.sample.steps=4",
    "--seconds=0",
]


@pytest.mark.slow
def test_the_command_beside_pytorch(tmp_path):
    """The parts of a model, tiny; then one part again, and the page alone, from what is kept."""
    pytest.importorskip("torch"), pytest.importorskip("diffusers")
    vae, out = save_vae(tmp_path / "vae", 0), tmp_path / "out"
    flags = [*TINY, f"--vae={vae}", f"--out={out}"]
    status, stdout, err = speed(*flags, "--what=train,denoise,sample,decode", "--rounds=2", "--against=diffusers")
    assert status == 0, err
    report = json.loads((out / "report.json").read_text())
    timed = {part["what"]: part for part in report["parts"]}
    assert set(timed) == {"train", "denoise", "sample", "decode"} and len(report["parts"]) == 4
    assert report["machine"]["cores"] >= 1 and report["machine"]["versions"]["jax"] == jax.__version__
    assert len(list((out / "parts").iterdir())) == 4
    for part in report["parts"]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", part["date"]) and part["images"] > 0
        assert (part["idle"] >= 0) and len(part["sides"]) == 2
        for label, side in part["sides"].items():
            assert len(side["seconds"]) == 2 and min(side["seconds"]) > 0
            assert side["memory"] > 2**25
            assert min(side["rates"]) > 0 and part["flop"] > 0
            assert label == page.PYTORCH_SIDE or side["compile"] > 0
            assert label in stdout
        assert part["name"] in stdout and part["name"] in (out / "benchmarks.md").read_text()
    for what in ("train", "denoise", "decode"):
        assert list(timed[what]["sides"]) == [page.JAX_SIDE, page.PYTORCH_SIDE]
    for what in ("train", "denoise", "decode"):
        side = timed[what]["sides"][page.JAX_SIDE]
        kinds, whole = side["profile"]["kinds"], side["profile"]["seconds"]
        # The same unit; how much of the step is arithmetic, a loaded machine decides.
        assert 1e-3 * whole < sum(seconds for seconds, _ in kinds.values()) < 10 * cores() * whole, what
        # Every product was seen, as often as it ran. Training makes some again. Decode's count is of all arithmetic.
        ratio = sum(flop for _, flop in kinds.values()) / timed[what]["flop"]
        assert (0.85 if what == "decode" else 0.98) < ratio < (1.4 if what == "train" else 1.02), (what, ratio)
        assert (profile.OPTIMIZER in kinds) == (what == "train")
        assert (profile.CONVOLUTIONS in kinds) == (what == "decode")
        assert {profile.WEIGHTS, profile.ATTENTION, profile.ELEMENTWISE} <= set(kinds) or what == "decode"
    assert profile.OPTIMIZER in stdout and profile.OPTIMIZER in (out / "benchmarks.md").read_text()
    assert np.isfinite([side["value"] for side in timed["train"]["sides"].values()]).all()
    # No speed is asked of these shapes. Two rounds decide nothing.
    assert [(t["target"].split(",")[0], t["met"]) for t in report["targets"]] == [
        (f"{what} DiT 2x32/2", None) for what in ("train", "denoise", "sample")
    ] + [(mock.ANY, None)]

    train = "train-DiT-2x32-2-batch-8.json"
    before = {path.name: path.read_bytes() for path in (out / "parts").iterdir()}
    status, _, err = speed(*flags, "--what=train", "--rounds=3")
    assert status == 0, err
    after = {path.name: path.read_bytes() for path in (out / "parts").iterdir()}
    assert [name for name in after if after[name] != before[name]] == [train]
    (out / "benchmarks.md").unlink()
    status, stdout, err = speed("--what=", f"--out={out}")
    assert status == 0 and "decode" in (out / "benchmarks.md").read_text(), err

    part = json.loads(after[train])
    part["machine"]["cpu"] = "another"
    (out / "parts" / train).write_text(json.dumps(part))
    one_error(speed("--what=", f"--out={out}"), train, "another", "--out")


@pytest.mark.slow
def test_a_start_refused_is_one_line():
    one_error(
        speed(*TINY, "--what=start", "--config.model.hidden_size=30", "--config.model.num_heads=2"),
        "start DiT 2x30/2",
        "hidden_size=30",
        "multiple of 4",
    )


@pytest.mark.slow
@long
def test_start_data_and_evaluation(tmp_path):
    status, stdout, err = speed(
        *TINY,
        "--what=start,data,evaluation",
        "--rounds=1",
        "--num_latents=512",
        "--samples=60",
        "--references=40",
        "--width=8",
        f"--scratch={tmp_path}",
        f"--out={tmp_path / 'out'}",
    )
    assert status == 0, err
    timed = json.loads((tmp_path / "out" / "report.json").read_text())["parts"]
    assert all(side["memory"] > 2**26 for side in timed[0]["sides"].values())  # the command's, with JAX in it
    assert [part["name"] for part in timed] == [
        "start DiT 2x32/2",
        "data, JPEG",
        "data, latents, 32x32x4",
        "FID, 60 samples",
        "precision, recall, 60 samples, 40 references",
    ]
    first, second = timed[0]["sides"].values()
    for side in (first, second):
        assert min(side["phases"].values()) >= 0 and sum(side["phases"].values()) == pytest.approx(side["seconds"][0])
    assert "| compiling" in stdout
    assert all(side["seconds"][0] > 0 and side["memory"] > 2**25 for part in timed for side in part["sides"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # what was made to be read is gone


def test_scaling_changes_one_thing_at_a_time(tmp_path):
    c = configs.paper("DiT-S/2")
    c.batch_size = 4
    scaling = parts.scaling_parts(configs.resolve(c), parts.Settings())
    base = {"batch": 4, "tokens": 256, "depth": 12}
    assert scaling[0].about == {"at": base, "base": base} and len(scaling) == len({part.name for part in scaling}) == 10
    for key, values in (("batch", {1, 2, 4, 8}), ("tokens", {64, 144, 256, 576}), ("depth", {3, 6, 12, 24})):
        assert {part.about["at"][key] for part in scaling} == values
    for part in scaling:
        at, config = part.about["at"], part.sides[page.JAX_SIDE][1]["config"]
        assert sum(at[key] != base[key] for key in base) <= 1
        assert config["batch_size"] == at["batch"] and config["model"]["depth"] == at["depth"]
        assert (config["model"]["input_size"] // 2) ** 2 == at["tokens"]
    records = [record("scaling", "DiT-S/2", 1, dit_jax=([0.1, 0.2], 1)) | part.about for part in scaling]
    page.scaling_plot(records, str(tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    page.scaling_plot(records[1:2], str(tmp_path / "scaling.png"))  # what all lines share was removed
    assert page.results(records).count("150 ms (100 ms to 200 ms)") == 10


def record(what, model, images, **sides):
    return {
        "name": f"{what} {model}",
        "what": what,
        "model": model,
        "images": images,
        "flop": 1e9,
        "sides": {
            label: {"seconds": seconds, "rates": [1e9 / 0.9] * len(seconds), "memory": memory}
            for label, (seconds, memory) in sides.items()
        },
    }


def test_targets():
    def met(*args, **sides):
        return [t["met"] for t in page.targets([record(*args, **sides)])]

    slow, fast = ([1.0, 2.0, 2.0, 2.0, 9.0], 200), ([0.5, 1.0, 1.0, 1.0, 5.0], 100)
    # Speed, memory, share of the matrix rate: 1 s is 90 % of it, 2 s are 45 %.
    assert met("train", "DiT-S/2", 8, dit_jax=fast, diffusers=slow) == [True, True, True]
    assert met("train", "DiT-S/2", 8, dit_jax=slow, diffusers=fast) == [False, False, False]
    assert met("train", "DiT-S/8", 32, dit_jax=fast, diffusers=fast) == [False, True]  # 1.2 times is asked for
    assert met("train", "DiT-B/4", 8, dit_jax=fast, diffusers=fast) == [True, True]
    assert met("train", "DiT-S/2", 16, dit_jax=fast, diffusers=slow) == [True]  # memory alone
    assert met("denoise", "DiT-XL/2", 1, dit_jax=fast, diffusers=slow) == [True, True, True]
    assert met("train", "DiT-S/2", 8, dit_jax=(fast[0][:4], 1), diffusers=(slow[0][:4], 1)) == [None, None, None]
    assert met("sample", "DiT-S/2", 1, dit_jax=([1.02] * 5, 1), **{page.BARE: ([1.0] * 5, 1)}) == [True]
    assert met("sample", "DiT-S/2", 1, dit_jax=([1.04] * 5, 1), **{page.BARE: ([1.0] * 5, 1)}) == [False]


def test_targets_of_a_gpu():
    def met(what, images, **changes):
        sides = {"dit_jax": ([1.0] * 5, 1), page.COMPILED_SIDE: ([1.1] * 5, 1)}
        part = record(what, "DiT-XL/2", images, **sides)
        part["sides"]["dit_jax"] |= {"platform": "gpu", "devices": 1, "device": "H100", "data_sheet": 2e9, **changes}
        return [t["met"] for t in page.targets([part])]

    assert met("train", 32) == [True, True] and met("train", 8) == []  # half of the data sheet's rate
    assert met("train", 64, data_sheet=3e9) == [True, False]
    assert met("train", 32, seconds=[1.2] * 5, data_sheet=None) == [False]
    assert met("denoise", 1) == [True] and met("denoise", 1, platform="cpu") == []


@pytest.mark.slow
@long
def test_the_command_beside_compiled_pytorch(tmp_path):
    """On the CPU, where PyTorch's compiler needs one of C++. Both sides say where they ran."""
    pytest.importorskip("torch")
    if not shutil.which("g++"):
        pytest.skip("no g++")
    status, stdout, err = speed(*TINY, "--what=denoise", "--against=pytorch", "--rounds=1", f"--out={tmp_path}")
    assert status == 0, err
    (part,) = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert list(part["sides"]) == [page.JAX_SIDE, page.COMPILED_SIDE] and "4 guided, 4 steps" in part["name"]
    for side in part["sides"].values():
        assert side["platform"] == "cpu" and side["dtype"] == "float32" and min(side["seconds"]) > 0
    assert page.COMPILED_SIDE in stdout and "A call denoises several steps" in (tmp_path / "benchmarks.md").read_text()


def test_times_are_printed_in_the_unit_that_fits():
    assert [page._time(s) for s in (2.0, 0.9996, 0.0123, -0.5, 4.2e-6, 3e-8)] == [
        "2 s",
        "1 s",
        "12.3 ms",
        "-500 ms",
        "4.2 µs",
        "0.03 µs",
    ]


def test_a_changed_model_is_not_the_papers():
    def name(**change):
        c = configs.paper("DiT-S/2")
        c.batch_size = 8
        c.model.update(change)
        return parts.label(configs.resolve(c))

    assert name() == "DiT-S/2" and name(depth=1) == "DiT-S/2 (depth=1)"
    assert name(dtype="float32") == "DiT-S/2"  # in which the targets are
    assert name(block="in_context", remat="full") == "DiT-S/2 (block=in_context, remat=full)"


def test_kinds_of_work():
    """Copies that reckon an index, a lone exponential, and products within a fusion."""
    text = """HloModule m

%slice (a: f32[4,8], i: s32[]) -> f32[1,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %three = s32[] constant(3)
  %back = s32[] subtract(%three, %i)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,8]{1,0} dynamic-slice(%a, %back, %zero), dynamic_slice_sizes={1,8}
}

%product (x: f32[2,4,8], y: f32[2,8,4]) -> f32[2,4,4] {
  %x = f32[2,4,8]{2,1,0} parameter(0)
  %y = f32[2,8,4]{2,1,0} parameter(1)
  ROOT %d = f32[2,4,4]{2,1,0} dot(%x, %y), lhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}
}

ENTRY %main (p: f32[4,8], q: s32[], r: f32[2,4,8], s: f32[2,8,4]) -> f32[1,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %r = f32[2,4,8]{2,1,0} parameter(2)
  %s = f32[2,8,4]{2,1,0} parameter(3)
  %t = f32[8,4]{0,1} transpose(%p), dimensions={1,0}
  %w = f32[4,4]{1,0} dot(%p, %t), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %b = f32[2,4,4]{2,1,0} fusion(%r, %s), kind=kCustom, calls=%product
  %u = f32[8,4]{0,1} add(%t, %t), metadata={op_name="jit(step)/optimizer/add"}
  %cut.1 = f32[1,8]{1,0} fusion(%p, %q), kind=kLoop, calls=%slice
  ROOT %e = f32[1,8]{1,0} exponential(%cut.1)
}
"""
    found = profile.instructions(text)
    assert {name: found[name] for name in "twbue"} | {"cut.1": found["cut.1"]} == {
        "t": (profile.MOVING, 0, False),
        "w": (profile.WEIGHTS, 2 * 4 * 4 * 8, True),
        "b": (profile.ATTENTION, 2 * 2 * 4 * 4 * 8, False),
        "u": (profile.OPTIMIZER, 0, False),
        "e": (profile.ELEMENTWISE, 0, False),
        "cut.1": (profile.MOVING, 0, False),
    }


def test_usual_metrics_are_the_same():
    """What evaluation is timed beside gives the same numbers."""
    for metric in ("FID", "precision, recall"):
        spec = {"metric": metric, "shapes": [(300, 6), (200, 6)]}
        value, usual = (evaluation.make({**spec, "usual": usual}).call()["value"] for usual in (False, True))
        assert_allclose(value, usual, rtol=1e-6)


def test_a_child_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = {"metric": "FID", "usual": False, "shapes": [(30, 2), (20, 2)]}
    with Child("benchmarks.speed.evaluation", spec) as child:
        assert child.ask()["value"] == pytest.approx(evaluation.make(spec).call()["value"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--what=train,nothing"], ["--what=nothing", "denoise"]),
        (["--what="], ["--what", "--out"]),
        (["--report", *TINY], ["--report", "--config"]),
        (["--config.batch_size=4"], ["--config.batch_size=4", "--config=configs/"]),
        ([*TINY, "--config.model.block=in_context", "--against=diffusers"], ["model.block=in_context", "adaln_zero"]),
        ([*TINY, "--config.model.num_classes=0", "--against=diffusers", "--what=train"], ["model.num_classes=0"]),
        ([*TINY, "--config.sample.cfg_scale=1", "--what=sample"], ["sample.cfg_scale=1", "--what=sample"]),
        ([*TINY, "--config.model.num_heads=5"], ["model.num_heads=5", "model.hidden_size=32"]),
        pytest.param(
            [*TINY, "--config.model.dtype=bfloat16", "--against=diffusers"],
            ["bfloat16", "--config.model.dtype=float32"],
            marks=pytest.mark.slow,  # imports PyTorch
        ),
        ([*TINY, "--what=decode", "--vae=nowhere"], ["nowhere"]),
        ([*TINY, "--what=decode", "--against=pytorch"], ["--against=pytorch", "--what=train,denoise,scaling"]),
        (["--what=data", "--cache=nowhere"], ["nowhere"]),
        (["--seconds=nan"], ["--seconds=nan"]),
        (["--scratch=/dev/null/x"], ["--scratch=/dev/null/x"]),
    ],
)
def test_bad_flags_are_one_line(flags, words):
    if any(flag.startswith("--against") for flag in flags) and not find_spec("torch"):
        pytest.skip("--against needs torch")
    one_error(speed(*flags), *words)


def test_one_at_a_time_writes_a_report(tmp_path):
    with files.hold(str(tmp_path), "out"):
        one_error(speed("--what=", f"--out={tmp_path}"), f"--out={tmp_path}", f"process {os.getpid()} on host")


def test_a_child_that_dies_is_one_line():
    """Of a geometry that the network refuses, and of a child that is killed, as for want of memory."""
    one_error(
        speed(*TINY, "--config.model.hidden_size=30", "--config.model.num_heads=2"),
        "train DiT 2x30/2, batch 8",
        "hidden_size=30",
    )
    process = speed(*TINY, "--what=sample", "--config.sample.steps=900", "--rounds=1000", wait=False)
    deadline = time.monotonic() + 120
    while (
        not (
            children := subprocess.run(
                ["pgrep", "-P", str(process.pid), "-f", "speed.jax_side"], text=True, capture_output=True
            ).stdout.split()
        )
        and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    os.kill(int(children[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    one_error((process.returncode, out, err), "sample DiT 2x32/2", "ended with status -9", "memory")
