"""The layout of the diffusers package, both ways, with that package as the oracle."""

import json
import os

import jax
import numpy as np
import pytest
from conftest import TINY, one_error
from numpy.testing import assert_allclose, assert_array_equal

import dit_jax
from dit_jax.models import dit
from dit_jax.runtime.errors import UserError
from dit_jax.vae import files as vae_files, network as vae_network
from dit_jax.weights import diffusers as layout, files, published

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

ARGS = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=10, null_class=True
)
VAE = dict(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, in_channels=3)
NAMES = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def flat():
    """Weights of which every number counts, under the published names."""
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in published.published_shapes(ARGS).items()
    }
    grid = ARGS["input_size"] // ARGS["patch_size"]
    return arrays | {"pos_embed": dit.position_embedding(ARGS["hidden_size"], grid)[None]}


def save_vae(folder):
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape).astype(np.float32), vae_network.abstract(**VAE)[1])
    vae_files.save(str(folder), VAE, params, 0.5)


@pytest.fixture(scope="module")
def folder(flat, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    layout.save(str(path), flat, ARGS, NAMES)
    save_vae(path / "vae")
    return path


def patched(transformer):
    """Their network with the paper's frequencies: theirs divide by 127."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return transformer.eval()


def test_their_pipeline_opens_what_is_written_and_samples(folder):
    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.get_label_ids(["class 3", "class 7"]) == [3, 7]
    for scale in (1.0, 4.0):  # with guidance as well: it looks for the null class at 1000
        out = pipe([3, 7], guidance_scale=scale, num_inference_steps=3, output_type="np").images
        assert out.shape == (2, 16, 16, 3) and np.isfinite(out).all()


def test_with_their_constant_patched_the_networks_are_equal(folder, flat):
    rng = np.random.default_rng(2)
    x, t, y = rng.standard_normal((5, 8, 8, 4), np.float32), np.array([0, 1, 500, 998, 999]), np.array([0, 3, 9, 10, 7])
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
    inputs = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(np.where(y == 10, 1000, y))
    with torch.no_grad():
        as_is = theirs.eval()(*inputs).sample.permute(0, 2, 3, 1).numpy()
        equal = patched(theirs)(*inputs).sample.permute(0, 2, 3, 1).numpy()
    model = dit_jax.load(str(folder), vae="")
    ours = np.asarray(model(x, t, y))
    assert_allclose(ours, equal, atol=1e-6 * np.abs(equal).max())
    assert np.abs(ours - as_is).max() > 1e-5 * np.abs(equal).max()  # so that the patch is what makes them equal


def test_a_folder_is_read_back_to_the_bit(folder, flat):
    read, info = layout.read(str(folder))
    assert list(read) == list(flat)
    for name, a in flat.items():
        assert_array_equal(read[name], a, err_msg=name)
    assert info["num_heads"] == 2 and info["num_classes"] == 10 and info["class_names"] == NAMES
    model = dit_jax.load(str(folder))
    assert model.class_names == NAMES and model.vae.scale == 0.5
    by_name = model.sample(["class 3", "class 7"], 2, steps=2, progress=False)
    assert by_name.shape == (2, 16, 16, 3) and by_name.dtype == np.uint8
    assert_array_equal(by_name, model.sample([3, 7], 2, steps=2, progress=False))


def test_what_their_package_writes_is_read(folder, flat, tmp_path):
    """safetensors and .bin, a transformer alone as well; with 1000 classes, as published, without names."""
    for safe in (True, False):
        pipe = diffusers.DiTPipeline.from_pretrained(folder)
        pipe.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        read, info = layout.read(str(tmp_path / str(safe)))
        for name, a in flat.items():
            if name != "y_embedder.embedding_table.weight":
                assert_array_equal(read[name], a, err_msg=name)
    read, info = layout.read(str(tmp_path / "True" / "transformer"))
    assert info["class_names"] is None and info["num_classes"] == 1000 and info["vae"] == ""
    assert read["y_embedder.embedding_table.weight"].shape == (1001, 32)


def test_convert_there_and_back(command, flat, tmp_path):
    save_vae(tmp_path / "vae")
    files.write(str(tmp_path / "w.npz"), flat)
    out = tmp_path / "pipeline"
    done = command("convert", f"--weights={tmp_path}/w.npz", "--num_heads=2", f"--out={out}", f"--vae={tmp_path}/vae")
    assert done[0] == 0, done[2]
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
    done = command("convert", f"--weights={out}", f"--out={tmp_path}/back.safetensors")
    assert done[0] == 0, done[2]
    back = files.read(str(tmp_path / "back.safetensors"))
    for name, a in flat.items():
        assert_array_equal(back[name], a)
    args = "--num=3", "--steps=2", "--classes=3", "--cfg_scale=1.5"
    assert command("sample", f"--weights={out}", f"--out={tmp_path}/a", *args)[0] == 0
    assert (
        command(
            "sample",
            f"--weights={tmp_path}/back.safetensors",
            "--num_heads=2",
            f"--vae={out}/vae",
            f"--out={tmp_path}/b",
            *args,
        )[0]
        == 0
    )
    a, b = (np.load(tmp_path / which / "samples.npz")["arr_0"] for which in "ab")
    assert_array_equal(a, b)


def test_what_does_not_fit_is_refused(command, flat, folder, tmp_path):
    with pytest.raises(UserError, match="without a null class"):
        layout.save(str(tmp_path), flat, ARGS | {"null_class": False}, None)
    files.write(str(tmp_path / "w.npz"), flat)
    one_error(
        command("convert", f"--weights={tmp_path}/w.npz", "--num_heads=2", f"--out={tmp_path}/out"), "--vae is missing"
    )
    copy = tmp_path / "copy"
    (copy / "transformer").mkdir(parents=True)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(config | {"norm_type": "layer_norm"}))
    with pytest.raises(UserError, match="no DiT"):
        layout.read(str(copy))
    (copy / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds no diffusion_pytorch_model.safetensors"):
        layout.read(str(copy))
    arrays = dict(files.read_all(str(folder / "transformer" / layout.WEIGHTS[0])))
    del arrays["transformer_blocks.1.attn1.to_k.bias"]
    files.write(str(copy / "transformer" / layout.WEIGHTS[0]), arrays)
    with pytest.raises(UserError, match="transformer_blocks.1.attn1.to_k.bias is missing"):
        dit_jax.load(str(copy))


def test_a_run_starts_from_a_folder(command, folder, tmp_path):
    done = command(
        "train", *TINY, "--config.steps=1", "--config.data.source=synthetic", "--config.model.in_channels=4",
        "--config.model.num_heads=2", "--config.model.depth=3", f"--config.init.weights={folder}", f"--workdir={tmp_path}",
        "--config.init.which=ema",
    )  # fmt: skip
    assert done[0] == 0, done[2]
    assert "init: weights" in done[1]
    assert os.path.isdir(tmp_path / "checkpoints" / "1")
