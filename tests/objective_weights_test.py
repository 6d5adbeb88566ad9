"""Weights of networks that are no DDPM: files of SiT and of MeanFlow networks in and out, loaded, and as a start."""

import argparse
import shutil

import jax
import numpy as np
import optax
import pytest
from conftest import TINY, one_error
from numpy.testing import assert_allclose, assert_array_equal

import dit_jax
from dit_jax import config as configs
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.meanflow import MeanFlow
from dit_jax.diffusion.objectives import DDPM
from dit_jax.models import dit
from dit_jax.parallel import layout, sharding
from dit_jax.runtime.errors import UserError
from dit_jax.training import initialize
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.step import TrainState, to_items
from dit_jax.weights import diffusers, files, load, published, training_checkpoint
from dit_jax.weights.checkpoint import Checkpoints

ONE = sharding.make_mesh(devices=jax.devices()[:1])
SIT = dict(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=32,
    depth=2,
    num_heads=2,
    num_classes=10,
    null_class=True,
    learn_sigma=True,
    second_time=False,
)
SMALL = SIT | dict(learn_sigma=False)
MEAN = SMALL | dict(second_time=True)
KINDS = {"sit": SIT, "small": SMALL, "mean": MEAN}


def drawn(args, seed=0):
    """Weights of which every number counts, under the published names."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in published.published_shapes(args).items()
    }
    return arrays | {
        "pos_embed": dit.position_embedding(args["hidden_size"], args["input_size"] // args["patch_size"])[None]
    }


def drawn_state(args, optimizer):
    """The state of a training run after 7 steps. The EMA has the other sign."""
    params, mean, square = (published.from_published(drawn(args, seed), args) for seed in range(3))
    mean["pos_embed"] = square["pos_embed"] = np.zeros_like(params["pos_embed"])
    opt_state = optax.tree.set(
        optimizer.init(params), mu=mean, nu=jax.tree.map(np.square, square), count=jax.numpy.int32(7)
    )
    return TrainState(jax.numpy.int32(7), params, jax.tree.map(np.negative, params), opt_state)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written[kind] -> the .npz file of a network of KINDS."""
    folder = tmp_path_factory.mktemp("weights")
    for kind, args in KINDS.items():
        files.write(str(folder / f"{kind}.npz"), drawn(args))
    return {kind: str(folder / f"{kind}.npz") for kind in KINDS}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, a in expected.items():
        assert_array_equal(np.asarray(actual[name]).view(np.uint32), a.view(np.uint32), err_msg=name)


@pytest.fixture
def run(tmp_path):
    """run("flow", args) -> the directory of a run with one checkpoint of drawn weights."""

    def make(objective, args, **changes):
        config = configs.paper("")
        fields = {f"model.{key}": value for key, value in args.items() if key not in ("null_class", "second_time")}
        config.update_from_flattened_dict(fields | {"objective": objective, "sample.every": 0} | changes)
        resolved = configs.resolve(config)
        shapes = dit.abstract(**configs.dit_args(layout.resolve_auto(resolved, jax.devices())))[1]
        state = drawn_state(args, make_optimizer(1e-4))
        assert jax.tree.map(np.shape, state.params) == jax.tree.map(np.shape, shapes)
        checkpoints = Checkpoints(str(tmp_path / "run"))
        items = jax.tree.map(jax.numpy.asarray, to_items(state))
        checkpoints.save(7, items, {"config": resolved, "data": "x", "train_seconds": 0.0})
        checkpoints.close()
        return str(tmp_path / "run")

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_all_kinds_go_through_to_the_bit(kind):
    args = KINDS[kind]
    flat = drawn(args)
    inferred = published.infer_args(flat, num_heads=2)
    assert inferred == args
    params = published.from_published(flat, inferred)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, dit.abstract(**args)[1])
    assert_same(published.to_published(params, inferred), flat)


def test_sits_files_in_and_out(command, tmp_path):
    """A bare state dict, and a training checkpoint, of which the EMA is taken."""
    torch = pytest.importorskip("torch")
    flat = drawn(SIT)
    tensors = {name: torch.from_numpy(a) for name, a in flat.items()}
    torch.save(tensors, tmp_path / "sit.pt")
    for source, out, *flags in (("sit.pt", "sit.npz", "--objective=flow"), ("sit.npz", "back.pt")):
        done = command("convert", f"--weights={tmp_path}/{source}", f"--out={tmp_path}/{out}", "--num_heads=2", *flags)
        assert done[0] == 0, done[2]
        assert_same(dict(files.read(str(tmp_path / out))), flat)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == list(tensors) and all(torch.equal(back[name], tensors[name]) for name in back)
    checkpoint = {"model": {name: a + 1 for name, a in tensors.items()}, "ema": tensors, "opt": {"state": {}}}
    torch.save(checkpoint | {"args": argparse.Namespace(path_type="Linear")}, tmp_path / "0400000.pt")
    loaded = load.load(str(tmp_path / "0400000.pt"), ONE, num_heads=2, objective="flow")
    assert_same(published.to_published(loaded.params, loaded.args), flat)


@pytest.mark.parametrize(
    "kind, given, objective, described",
    [
        ("sit", None, DDPM(), {"timesteps": 1000}),
        ("sit", "ddpm", DDPM(), {"timesteps": 1000}),
        ("sit", "flow", Flow(), {"objective": {"name": "flow", "path": "linear", "prediction": "velocity"}}),
        (
            "small",
            "flow:path=gvp,prediction=noise",
            Flow("gvp", "noise"),
            {"objective": {"name": "flow", "path": "gvp", "prediction": "noise"}},
        ),
        ("small", Flow("vp", "score"), Flow("vp", "score"), None),
        ("mean", None, MeanFlow(), {"objective": {"name": "meanflow"}}),
        ("mean", "meanflow", MeanFlow(), {"objective": {"name": "meanflow"}}),
    ],
    ids=str,
)
def test_what_a_file_is_read_as(written, kind, given, objective, described):
    loaded = load.load(written[kind], ONE, num_heads=2, objective=given)
    assert loaded.objective == objective
    assert_same(published.to_published(loaded.params, loaded.args), drawn(KINDS[kind]))  # the variance too
    if described:
        origin = {key: value for key, value in loaded.origin.items() if key not in ("weights", "sha256", "which")}
        assert origin == described


@pytest.mark.parametrize(
    "kind, given, words",
    [
        (
            "sit",
            "meanflow",
            "sit.npz: h_embedder.mlp.0 and h_embedder.mlp.2 are missing, which objective=meanflow needs",
        ),
        ("mean", "flow", "mean.npz: has h_embedder.mlp.0 and h_embedder.mlp.2, .* which objective=flow does not use"),
        ("mean", "ddpm", "has h_embedder.mlp.0 and h_embedder.mlp.2"),
        ("small", None, "small.npz: final_layer.linear has no channels of the variance, which objective=ddpm needs"),
        ("sit", "sit", "objective='sit': must be one of ddpm, flow, meanflow"),
        ("sit", 3, "objective=3: must be one of ddpm, flow, meanflow"),
        ("sit", "flow:path=ddim", "'path=ddim' is no option of flow: path is one of linear, .*prediction is one of"),
        ("mean", "meanflow:steps=3", "'steps=3' is no option of meanflow"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(written, kind, given, words):
    with pytest.raises(UserError, match=words) as e:
        load.load(written[kind], ONE, num_heads=2, objective=given)
    assert "\n" not in str(e.value)


def test_arrays_without_a_place_are_named():
    flat = drawn(MEAN)
    with pytest.raises(UserError, match="unknown array h_embedder.mlp.0.weight"):
        published.from_published(flat, SMALL)
    del flat["h_embedder.mlp.0.bias"]
    with pytest.raises(UserError, match="h_embedder.mlp.0.bias is missing"):
        published.from_published(flat, published.infer_args(flat, 2))
    flat = drawn(SIT)
    flat["final_layer.linear.weight"] = flat["final_layer.linear.weight"][:-1]
    with pytest.raises(UserError, match=r"final_layer.linear.weight has shape \(31, 32\), the model needs \(32, 32\)"):
        published.from_published(flat, published.infer_args(flat, 2))


def test_what_is_known_to_be_ddpm_is_not_read_as_something_else(written, run, command, monkeypatch, tmp_path):
    diffusers.save(str(tmp_path / "folder"), drawn(SIT), SIT, None, DDPM(500))
    assert load.load(str(tmp_path / "folder"), ONE).objective == DDPM(500)
    with pytest.raises(UserError, match="objective=flow: folder is of the objective ddpm: leave it out"):
        load.load(str(tmp_path / "folder"), ONE, objective="flow")
    where = run("flow", SMALL)
    with pytest.raises(UserError, match="objective=flow: is for a weights file"):
        load.load(where, ONE, objective="flow")
    done = command("sample", f"--workdir={where}", "--objective=flow", f"--out={tmp_path}/out")
    one_error(done, "--objective is of a weights file: give it with --weights")
    # SiT's own file has no address that lasts.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="SiT-XL/2-256: .* fetch SiT-XL-2-256x256.pt .*--weights=FILE --objective=flow"):
        load.load("SiT-XL/2-256", ONE)
    monkeypatch.setitem(load.SIT, "SiT-XL/2-256", "fetched.npz")
    (tmp_path / "cache/dit_jax/weights").mkdir(parents=True)
    shutil.copy(written["sit"], tmp_path / "cache/dit_jax/weights/fetched.npz")
    loaded = load.load("SiT-XL/2-256", ONE, num_heads=2)
    assert loaded.objective == Flow() and loaded.vae == load.VAE and loaded.origin["weights"] == "fetched.npz"


@pytest.mark.parametrize(
    "objective, args, described",
    [
        ("ddpm", SIT, {"timesteps": 1000}),
        ("flow", SIT, None),
        ("flow", SMALL, None),
        ("meanflow", MEAN, None),
    ],
    ids=["ddpm", "flow with variance", "flow", "meanflow"],
)
def test_a_run_is_loaded_and_written(command, run, objective, args, described, tmp_path):
    """Its objective comes from its config. What is written comes back to the bit."""
    where, expected = run(objective, args), drawn(args)
    loaded = load.load(where, ONE, which="raw")
    assert loaded.objective.name == objective and loaded.origin["step"] == 7
    origin = {key: value for key, value in loaded.origin.items() if key in ("timesteps", "objective")}
    assert origin == described if described else origin["objective"]["name"] == objective and "timesteps" not in origin
    assert_same(published.to_published(loaded.params, args), expected)
    if objective == "ddpm":
        return
    out = tmp_path / "out.npz"
    done = command("convert", f"--workdir={where}", "--which=raw", f"--out={out}")
    assert done[0] == 0, done[2]
    assert_same(dict(files.read(str(out))), expected)
    done = command("convert", f"--workdir={where}", f"--out={tmp_path}/folder")
    one_error(done, f"diffusers' DiT pipeline is of objective=ddpm, and this network of {objective}")


def test_a_diffusers_folder_is_for_the_papers_network(command, written, tmp_path):
    out = f"--out={tmp_path}/folder"
    for kind, flags, words in (
        ("sit", ["--objective=flow"], "is of objective=ddpm, and this network of flow"),
        ("small", [], "has no channels of the variance: write a weights file"),
        ("mean", [], "has a second time: write a weights file"),
    ):
        one_error(command("convert", f"--weights={written[kind]}", "--num_heads=2", out, *flags), words)


# Both b are exact in float32, in which optax corrects the bias. PyTorch does it in double.
OPTIMIZER = dict(learning_rate=0.002, b1=0.875, b2=0.96875, eps=1e-7, weight_decay=0.125)


def published_module(torch, args):
    """An empty network that registers its parameters in the order of the published DiT and SiT."""
    nn, d, p = torch.nn, args["hidden_size"], args["patch_size"]

    def named(**modules):
        module = nn.Module()
        for name, child in modules.items():
            module.add_module(name, child)
        return module

    def block():
        return named(
            attn=named(qkv=nn.Linear(d, 3 * d), proj=nn.Linear(d, d)),
            mlp=named(fc1=nn.Linear(d, 4 * d), fc2=nn.Linear(4 * d, d)),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d)),
        )

    model = named(
        x_embedder=named(proj=nn.Conv2d(args["in_channels"], d, p, p)),
        t_embedder=named(mlp=nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))),
        y_embedder=named(embedding_table=nn.Embedding(args["num_classes"] + 1, d)),
    )
    tokens = (args["input_size"] // p) ** 2
    model.pos_embed = nn.Parameter(torch.zeros(1, tokens, d), requires_grad=False)
    model.blocks = nn.ModuleList([block() for _ in range(args["depth"])])
    model.final_layer = named(
        linear=nn.Linear(d, p * p * 2 * args["in_channels"]),
        adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d)),
    )
    return model


@pytest.mark.slow
def test_a_training_checkpoint_goes_on_in_pytorch(command, run, tmp_path):
    """The published module and its AdamW load it, and their next update is ours, given the gradients."""
    torch = pytest.importorskip("torch")
    where = run("flow", SIT, **{f"optimizer.{name}": value for name, value in OPTIMIZER.items()})
    out = f"{tmp_path}/0000007.pt"
    done = command("convert", f"--workdir={where}", "--training", f"--out={out}")
    assert done[0] == 0, done[2]
    state = drawn_state(SIT, make_optimizer(**OPTIMIZER))
    assert_same(dict(files.read(out, "raw")), published.to_published(state.params, SIT))
    assert_same(dict(files.read(out, "ema")), published.to_published(state.ema, SIT))
    data = torch.load(out, weights_only=False)
    assert list(data) == ["model", "ema", "opt", "args"] and isinstance(data["args"], argparse.Namespace)
    assert data["args"].path_type == "Linear" and data["args"].model is None

    model, average = (published_module(torch, SIT) for _ in range(2))
    model.load_state_dict(data["model"])
    average.load_state_dict(data["ema"])
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    keys = adamw.state_dict()["param_groups"][0].keys()
    adamw.load_state_dict(data["opt"])
    assert data["opt"]["param_groups"][0].keys() == keys and 0 not in data["opt"]["state"]
    grads = published.from_published(drawn(SIT, seed=3), SIT)
    grads["pos_embed"] = np.zeros_like(grads["pos_embed"])  # it is frozen
    for (name, a), parameter in zip(published.to_published(grads, SIT).items(), model.parameters(), strict=True):
        parameter.grad = torch.tensor(a) if name != "pos_embed" else None
    adamw.step()
    updates, opt_state = jax.jit(make_optimizer(**OPTIMIZER).update)(grads, state.opt_state, state.params)
    ours = {
        "exp_avg": optax.tree.get(opt_state, "mu"),
        "exp_avg_sq": optax.tree.get(opt_state, "nu"),
        "updated": jax.tree.map(np.add, state.params, updates),
    }
    ours = {key: published.to_published(tree, SIT) for key, tree in ours.items()}
    for name, parameter in model.named_parameters():
        theirs = {**adamw.state.get(parameter, {}), "updated": parameter}
        assert theirs.pop("step", 8) == 8
        for key, value in theirs.items():
            value, size = value.detach().numpy(), np.abs(ours[key][name]).max()
            assert_allclose(value, ours[key][name], rtol=1e-6, atol=1e-6 * size, err_msg=f"{key} {name}")
        moved = np.abs(ours["updated"][name] - data["model"][name].numpy()).max()
        assert moved > 1e-4 if name != "pos_embed" else moved == 0


def test_the_command_line_is_that_of_the_published_code():
    def line(objective, model, **changes):
        config = configs.paper(model)
        config.update_from_flattened_dict({"objective": objective, **changes})
        resolved = layout.resolve_auto(configs.resolve(config), jax.devices())
        args = configs.dit_args(resolved)
        return vars(training_checkpoint.command_line(resolved, args, configs.objective_of(resolved)))

    dit_line = line("ddpm", "DiT-XL/2", **{"vae.path": "stabilityai/sd-vae-ft-mse", "seed": 3, "data.path": "/cache"})
    assert dit_line == dict(
        data_path="", results_dir="results", model="DiT-XL/2", image_size=256, num_classes=1000, epochs=1400,
        global_batch_size=256, global_seed=3, vae="mse", num_workers=4, log_every=100, ckpt_every=10_000,
    )  # fmt: skip
    of_sit = {"flow.path": "gvp", "flow.prediction": "score", "flow.weight": "likelihood", "model.input_size": 64}
    assert line("flow", "DiT-B/4", **of_sit) == dit_line | dict(
        model="SiT-B/4", image_size=512, global_seed=0, vae="ema", sample_every=50_000, cfg_scale=4.0, wandb=False,
        ckpt=None, path_type="GVP", prediction="score", loss_weight="likelihood", sample_eps=1e-3, train_eps=1e-3,
    )  # fmt: skip
    with pytest.raises(UserError, match="objective=meanflow: DiT's and SiT's train.py do not know it"):
        line("meanflow", "DiT-B/4", **{"sample.sampler": "meanflow", "sample.cfg_scale": 1.0})
    with pytest.raises(UserError, match="flow.prediction=x_0: SiT's train.py does not know it"):
        line("flow", "DiT-B/4", **{"flow.prediction": "x_0"})


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--weights=x.npz", "--out=x.pt"], "--training: a weights file has no optimizer state: give a run"),
        (["--workdir=x", "--out=x.npz"], "--training: writes a .pt file, and --out=x.npz is none"),
        (["--workdir=x", "--out=x.pt", "--which=ema"], "--which=ema: --training writes the raw and the EMA weights"),
    ],
    ids=["weights", "npz", "which"],
)
def test_what_is_no_training_checkpoint_is_refused(command, flags, words):
    one_error(command("convert", "--training", *flags), words)


def start(weights, args, mesh=ONE, seed=0):
    args = args | {"block": "adaln_zero"}
    return initialize.initial_params(weights, "ema", args=args, mesh=mesh, seed=seed)[0]


def without_variance(flat):
    """The published arrays with the first C channels of the head."""
    channels, pixels = SIT["in_channels"], SIT["patch_size"] ** 2
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    heads = {name: flat[name].reshape(pixels, 2 * channels, *flat[name].shape[1:])[:, :channels] for name in names}
    return flat | {name: a.reshape(pixels * channels, *a.shape[2:]) for name, a in heads.items()}


@pytest.mark.slow
def test_a_head_loses_its_variance(written, run, capsys):
    """From a file and from a run of ddpm into a flow run, on one device and on four."""
    line = "init: the head keeps the 4 channels of the prediction (those of the variance are left out"
    expected = without_variance(drawn(SIT))
    params = start(written["sit"], SMALL)
    assert line in capsys.readouterr().out
    assert_same(published.to_published(params, SMALL), expected)
    mesh = sharding.make_mesh(devices=jax.devices()[:4], data=1, fsdp=2, tensor=2)
    split = start(written["sit"], SMALL, mesh)
    jax.tree.map(assert_array_equal, split, params)
    shardings = sharding.state_shardings(dit.abstract(**SMALL)[1], mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding == s, split, shardings)))
    capsys.readouterr()
    for kind, args in (("small", SMALL), ("sit", SIT)):
        assert_same(published.to_published(start(written[kind], args), args), drawn(args))
    assert "the head keeps" not in capsys.readouterr().out
    head = start(run("ddpm", SIT), SMALL | {"num_classes": 3})["final_layer"]["linear"]
    assert_array_equal(head["kernel"], -expected["final_layer.linear.weight"].T)
    assert_array_equal(head["bias"], -expected["final_layer.linear.bias"])


@pytest.mark.parametrize(
    "kind, args, words",
    [
        ("sit", MEAN, "h_embedder.mlp.0 and h_embedder.mlp.2 are missing, the second time of objective=meanflow"),
        ("small", MEAN, "h_embedder.mlp.0 and h_embedder.mlp.2 are missing, the second time of objective=meanflow"),
        ("mean", SMALL, "these weights have h_embedder.mlp.0 and h_embedder.mlp.2, the second time of MeanFlow"),
        ("small", SIT, "final_layer.linear has no channels of the variance in these weights"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_by_name(written, kind, args, words):
    with pytest.raises(UserError, match=f"^init.weights=.*{kind}.npz: {words}"):
        start(written[kind], args)


def test_a_meanflow_run_goes_on_from_another(written):
    assert_same(published.to_published(start(written["mean"], MEAN), MEAN), drawn(MEAN))


def test_a_file_of_sit_samples(written, command, tmp_path):
    """The API's samples are the command's, and the manifest says of what they are."""
    model = dit_jax.load(written["sit"], objective="flow", num_heads=2, mesh=ONE)
    images = model.sample([3], 2, steps=4, cfg_scale=1.5, progress=False)
    assert images.shape == (2, 8, 8, 4) and np.isfinite(images).all()
    small = dit_jax.load(written["sit"], objective=Flow(), num_heads=2, mesh=ONE)
    assert_array_equal(small.sample([3], 2, steps=4, cfg_scale=1.5, progress=False), images)
    flags = ("--num_heads=2", "--num=2", "--classes=3", "--steps=4", "--cfg_scale=1.5", f"--out={tmp_path}")
    done = command("sample", f"--weights={written['sit']}", "--objective=flow", *flags)
    assert done[0] == 0, done[2]
    assert_array_equal(np.load(tmp_path / "samples.npz")["latents"], images)


@pytest.mark.slow
def test_a_flow_run_starts_from_weights_of_sit(command, written, tmp_path):
    done = command(
        "train", *TINY, "--config.objective=flow", "--config.steps=1", "--config.data.source=synthetic",
        "--config.model.in_channels=4", "--config.model.num_heads=2", f"--config.init.weights={written['sit']}",
        f"--workdir={tmp_path}",
    )  # fmt: skip
    assert done[0] == 0, done[2]
    assert "init: the head keeps the 4 channels of the prediction" in done[1]
    assert load.load(str(tmp_path), ONE).objective == Flow()
