"""Stable Diffusion's VAE: against diffusers, in every format, and in pieces."""

import hashlib
import json
import os
import shutil
import sys
from importlib.util import find_spec

import fake_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, nhwc
from numpy.testing import assert_allclose, assert_array_equal
from preflight_test import tiny_config
from safetensors.numpy import load_file, save_file

from dit_jax.aot import estimate, report
from dit_jax.parallel import sharding
from dit_jax.runtime.errors import UserError
from dit_jax.vae import files as vae_files, network
from dit_jax.weights import pytorch

SMALL = dict(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, in_channels=3)
WEIGHTS = vae_files.WEIGHTS


def random_params(args, seed=0):
    """Every parameter away from what it starts as, and activations of order one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        z = rng.standard_normal(leaf.shape).astype(np.float32)
        fan_in = float(np.prod(leaf.shape[:-1]))
        return {"kernel": z / fan_in**0.5, "scale": 1 + 0.1 * z, "bias": 0.1 * z}[path[-1].key]

    return jax.tree_util.tree_map_with_path(draw, network.abstract(**args)[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "small"
    vae_files.save(path, SMALL, random_params(SMALL), scale=0.5)
    return path


def rewrite(folder, target, change):
    """A copy of the folder with change({name: array})."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    flat = change(load_file(folder / WEIGHTS))
    save_file({name: np.ascontiguousarray(a) for name, a in flat.items()}, target / WEIGHTS)
    return target


def attention(flat, names, shape=()):
    """The flat weights with to_q, to_k, to_v and to_out.0 under other names."""

    def rename(name):
        for new, old in zip(("to_q", "to_k", "to_v", "to_out.0"), names):
            name = name.replace(f".{new}.", f".{old}.")
        return name

    return {
        rename(name): a.reshape(a.shape + shape) if "attentions" in name and a.ndim == 2 else a
        for name, a in flat.items()
    }


def compvis(flat, levels=2):
    """The flat weights in the original code's layout."""
    named = {}
    for name, a in attention(flat, ("q", "k", "v", "proj_out"), (1, 1)).items():
        for i in range(levels):
            name = name.replace(f"decoder.up_blocks.{i}.", f"decoder.up.{levels - 1 - i}.")
        for new, old in (
            (".down_blocks.", ".down."),
            (".resnets.", ".block."),
            (".downsamplers.0.", ".downsample."),
            (".upsamplers.0.", ".upsample."),
            (".mid_block.block.0.", ".mid.block_1."),
            (".mid_block.block.1.", ".mid.block_2."),
            (".mid_block.attentions.0.", ".mid.attn_1."),
            (".group_norm.", ".norm."),
            (".conv_shortcut.", ".nin_shortcut."),
            (".conv_norm_out.", ".norm_out."),
        ):
            name = name.replace(new, old)
        named[name] = a
    return named


@pytest.mark.parametrize("names", ["vae_diffusers", "vae_diffusers_old_names"])
def test_golden(names, tmp_path):
    source = GOLDEN / "vae" / names
    if not source.exists():
        pytest.skip("the whole golden folder only (DIT_JAX_GOLDEN)")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    shutil.copyfile(GOLDEN / "vae" / "vae_diffusers" / "config.json", tmp_path / "config.json")
    codec, z = vae_files.load(str(tmp_path)), np.load(GOLDEN / "vae" / "vae_golden.npz")
    mean, std = jax.jit(codec.encode)(codec.params, nhwc(z["image"]))
    assert_allclose(mean, nhwc(z["mean"]), atol=3e-5)
    assert_allclose(std, nhwc(z["std"]), atol=3e-5)
    decoded = jax.jit(codec.decode)(codec.params, nhwc(z["latent"]) * codec.scale)
    assert_allclose(decoded, nhwc(z["decoded"]), atol=3e-5)
    assert codec.identity["encoder"] == vae_files.load(str(GOLDEN / "vae" / "vae_diffusers")).identity["encoder"]


@pytest.mark.parametrize(
    "args, batch, height, width",
    [
        (SMALL, 3, 24, 40),
        (
            SMALL | dict(block_out_channels=(16, 8, 24, 40), layers_per_block=2, latent_channels=3, norm_num_groups=8),
            2,
            64,
            32,
        ),
    ],
)
def test_equal_to_diffusers(args, batch, height, width, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    params, rng = random_params(args), np.random.default_rng(1)
    params["quant_conv"]["bias"][-2:] = -100, 100  # the log variance is clipped
    vae_files.save(tmp_path, args, params, scale=0.3)
    oracle, codec = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval(), vae_files.load(str(tmp_path))
    assert codec.args == args and codec.scale == oracle.config.scaling_factor == 0.3
    for ours, theirs in zip(jax.tree.leaves(codec.params), jax.tree.leaves(params)):
        assert_array_equal(ours, theirs)
    images = rng.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    with torch.no_grad():
        posterior = oracle.encode(torch.tensor(images / 127.5 - 1).float().permute(0, 3, 1, 2)).latent_dist
        decoded = oracle.decode(posterior.mean).sample
    mean, std = jax.jit(codec.encode)(codec.params, images)
    assert_allclose(mean, nhwc(posterior.mean), atol=3e-5)
    assert_allclose(std, nhwc(posterior.std), atol=3e-5, rtol=1e-5)
    assert_allclose(std[0, 0, 0, -2:], np.exp([-15, 10]), rtol=1e-5)
    assert_allclose(jax.jit(codec.decode)(codec.params, mean * codec.scale), nhwc(decoded), atol=3e-5)
    assert mean.shape == (batch, height // codec.factor, width // codec.factor, codec.latent_channels)


def test_every_generation_of_names_is_the_same_vae(folder, tmp_path):
    whole = vae_files.load(str(folder))
    old = ("query", "key", "value", "proj_attn")
    generations = {
        "old": lambda flat: attention(flat, old),
        "older": lambda flat: attention(flat, old, (1, 1)),
        "compvis": lambda flat: compvis(flat) | {"loss.logvar": np.zeros(()), "model_ema.decay": np.zeros(())},
        "checkpoint": lambda flat: (
            {f"first_stage_model.{name}": a for name, a in compvis(flat).items()}
            | {"model.diffusion_model.out.0.weight": np.zeros(3)}
        ),
    }
    for name, change in generations.items():
        codec = vae_files.load(str(rewrite(folder, tmp_path / name, change)))
        jax.tree.map(assert_array_equal, codec.params, whole.params)
        assert codec.identity["encoder"] == whole.identity["encoder"]
        assert codec.identity["decoder"] == whole.identity["decoder"]
        assert codec.identity["sha256"] == hashlib.sha256((tmp_path / name / WEIGHTS).read_bytes()).hexdigest()
    assert {len(whole.identity[part]) for part in ("encoder", "decoder")} == {16}
    ones = {"decoder.conv_out.bias": np.ones(3, np.float32)}
    changed = rewrite(folder, tmp_path / "changed", lambda flat: flat | ones)
    identity = vae_files.load(str(changed)).identity
    assert identity["encoder"] == whole.identity["encoder"] and identity["decoder"] != whole.identity["decoder"]
    assert identity["scale"] == 0.5 and identity["name"] == "changed"


def test_the_layout_of_compvis_against_diffusers_own_conversion(folder):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    flat = load_file(folder / WEIGHTS)
    theirs = convert_ldm_vae_checkpoint(
        {name: torch.tensor(a) for name, a in compvis(flat).items()}, json.loads((folder / "config.json").read_text())
    )
    assert {name: tuple(a.shape) for name, a in theirs.items()} == {name: a.shape for name, a in flat.items()}
    for name, a in theirs.items():
        assert_array_equal(a, flat[name])


def test_torch_files_and_half_precision(folder, tmp_path):
    torch = pytest.importorskip("torch")
    flat, whole = load_file(folder / WEIGHTS), vae_files.load(str(folder))
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    tensors = {name: torch.tensor(a) for name, a in flat.items()}
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    original = {name: torch.tensor(a) for name, a in compvis(flat).items()}
    torch.save({"state_dict": original, "epoch": 3}, tmp_path / "a.ckpt")
    for where in (tmp_path, tmp_path / "a.ckpt"):
        jax.tree.map(assert_array_equal, vae_files.load(str(where)).params, whole.params)
    for dtype, type in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        torch.save({name: a.to(getattr(torch, dtype)) for name, a in tensors.items()}, tmp_path / "half.pt")
        expected = jax.tree.map(lambda a: a.astype(type).astype(np.float32), whole.params)
        jax.tree.map(assert_array_equal, vae_files.load(str(tmp_path / "half.pt")).params, expected)
        from safetensors.torch import save_file as save_tensors

        save_tensors({name: a.to(getattr(torch, dtype)) for name, a in tensors.items()}, tmp_path / "half.safetensors")
        codec = vae_files.load(str(tmp_path / "half.safetensors"))
        jax.tree.map(assert_array_equal, codec.params, expected)
        assert {a.dtype for a in jax.tree.leaves(codec.params)} == {np.dtype(np.float32)}


def test_the_published_size():
    shapes = json.loads((GOLDEN / "vae" / "vae_full_shapes.json").read_text())
    params = jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), network.abstract(**network.PUBLISHED)[1])
    ours = pytorch.from_flax(params)
    assert {name: list(a.shape) for name, a in ours.items()} == shapes
    assert len(ours) == 248 and sum(a.size for a in ours.values()) == 83_653_863


def test_geometry_without_a_config(tmp_path):
    args = SMALL | dict(block_out_channels=(32, 32, 64), norm_num_groups=32, latent_channels=5)
    vae_files.save(tmp_path, args, random_params(args))
    os.remove(tmp_path / "config.json")
    codec = vae_files.load(str(tmp_path / WEIGHTS))
    assert codec.args == args and codec.scale == 0.18215 and codec.factor == 4


def drop(flat, name):
    return {key: a for key, a in flat.items() if key != name}


DAMAGED = {  # what is done to the weights: what the one line must say
    "missing": (lambda flat: drop(flat, "encoder.conv_out.bias"), "encoder.conv_out.bias is missing"),
    "first": (lambda flat: drop(flat, "encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
    "extra": (lambda flat: flat | {"decoder.extra.weight": np.zeros(3)}, "unknown array decoder.extra.weight"),
    "shape": (lambda flat: flat | {"quant_conv.bias": np.zeros(7)}, r"quant_conv.bias has shape \(7,\).*\(8,\)"),
    "not finite": (lambda flat: flat | {"quant_conv.bias": np.full(8, np.nan)}, "quant_conv.bias .* not finite"),
    "another": (lambda flat: {"blocks.0.weight": np.zeros(3, np.float32)}, "is missing: this is no VAE"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights(case, folder, tmp_path):
    change, words = DAMAGED[case]
    with pytest.raises(UserError, match=words) as e:
        vae_files.load(str(rewrite(folder, tmp_path, change)))
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_files_that_cannot_be_read(folder, tmp_path, monkeypatch):
    def refused(where, words):
        with pytest.raises(UserError, match=words) as e:
            vae_files.load(str(where))
        assert "\n" not in str(e.value) and os.path.basename(where) in str(e.value)

    data = (folder / WEIGHTS).read_bytes()
    for size in (0, 5, 1000, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        refused(tmp_path / "cut.safetensors", "cannot be read.*is it whole")
    (tmp_path / "cut.bin").write_bytes(data[:1000])
    if find_spec("torch"):
        refused(tmp_path / "cut.bin", "cannot be read")
    refused(tmp_path / "absent", "no such file or folder.*sd-vae-ft-ema")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no diffusion_pytorch_model.safetensors")
    shutil.copyfile(folder / WEIGHTS, tmp_path / "alone.safetensors")
    refused(tmp_path / "alone.safetensors", "norm_num_groups=32 does not divide .*8, 16.*config.json")
    for text, words in (
        ('{"act_fn": "relu"}', "act_fn='relu'"),
        ('{"_class_name": "UNet"}', "_class_name='UNet'"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"scaling_factor": 0}', "must be positive"),
        ('{"norm_num_groups": 4, "latent_channels": 3}', "needs"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=words):
            vae_files.load(str(tmp_path / "alone.safetensors"))
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(tmp_path / "cut.bin", "PyTorch: pip install")


def test_the_decoder_over_devices_and_posteriors(folder):
    codec, size = vae_files.load(str(folder)), 8
    latents = np.random.default_rng(2).standard_normal((21, 4, 4, 4)).astype(np.float32)
    one = codec.decoder(None, size)(latents)
    assert one.shape == (21, size, size, 3) and one.dtype == np.float32
    mesh = sharding.make_mesh(data=2, fsdp=2)
    assert_array_equal(codec.decoder(mesh, size)(latents), one)  # the same program on each device

    images = np.random.default_rng(3).integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    both = sharding.over_devices(codec.posteriors, mesh)(codec.params, images)
    encode = jax.jit(codec.encode)
    for i, pictures in enumerate((images, images[:, :, ::-1])):
        assert_allclose(
            both[:, i], np.concatenate(encode(codec.params, pictures / np.float32(127.5) - 1), axis=-1), atol=1e-5
        )


def test_bfloat16_is_near_and_keeps_float32_parameters(folder):
    images = np.random.default_rng(4).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    codecs = [vae_files.load(str(folder), dtype) for dtype in ("float32", "bfloat16")]
    exact, half = (jax.jit(codec.encode)(codec.params, images) for codec in codecs)
    for a, b in zip(exact, half):
        assert b.dtype == np.float32
        assert 1e-4 < np.abs(a - b).max() / np.std(a) < 0.1
    assert {a.dtype for a in jax.tree.leaves(codecs[1].params)} == {np.dtype(np.float32)}


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub on this machine with one VAE, at vae_files.HUB["me/small"]."""
    args = SMALL | dict(block_out_channels=(32, 32), norm_num_groups=32)
    vae_files.save(tmp_path / "big", args, random_params(args))
    body = (tmp_path / "big" / WEIGHTS).read_bytes()
    hub = fake_hub.Hub({"me/small": {WEIGHTS: body}})
    hub.use(monkeypatch, tmp_path / "cache")
    monkeypatch.setitem(vae_files.HUB, "me/small", (fake_hub.COMMIT, fake_hub.digest(body)))
    yield hub
    hub.close()


def test_a_published_vae_is_fetched_once_and_checked(hub):
    codec = vae_files.load("me/small")
    assert codec.identity["name"] == "me/small" and codec.identity["sha256"] == vae_files.HUB["me/small"][1]
    jax.tree.map(assert_array_equal, codec.params, random_params(codec.args))
    vae_files.load("me/small")
    assert sum(path.endswith(WEIGHTS) for path in hub.served) == 1


@pytest.mark.parametrize(
    "fault, words",
    [
        ("changed", "is damaged .*was removed: run again"),
        ("cut", "cannot be fetched .*run again to resume"),
        ("gone", "holds no diffusion_pytorch_model.safetensors"),
        ("unreachable", "cannot be fetched .*name their folder"),
    ],
)
def test_a_fetch_that_fails_is_one_line_and_can_be_repeated(fault, words, hub, monkeypatch):
    hub.fault = fault
    if fault == "gone":
        hub.repositories["me/small"] = {}
    elif fault == "unreachable":
        monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    with pytest.raises(UserError, match=words) as e:
        vae_files.load("me/small")
    assert "\n" not in str(e.value)
    if fault in ("changed", "cut"):
        hub.fault = None
        assert vae_files.load("me/small").identity["sha256"] == vae_files.HUB["me/small"][1]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_preflight_compiles_the_vae(what, monkeypatch):
    monkeypatch.setattr(network, "PUBLISHED", SMALL)
    r = estimate.estimate_run(tiny_config(**{"model.input_size": 8}), "v3-8", what)
    assert r["fits"] and r["model"] == "AutoencoderKL" and r["images_per_step"] == 8 * 4
    assert r["hbm_peak_bytes"] < 2**28 and "fits" in report.text(r)
    assert r["bounds_s"]["arithmetic"] == 6 * r["matrix_flops_per_device"] / r["peak_figures"]["flops_per_s"]
    with pytest.raises(UserError, match="in_channels=1"):
        estimate.estimate_run(tiny_config(**{"model.in_channels": 1}), "v3-8", what)
