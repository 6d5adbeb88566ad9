"""Runs that start from weights: against the published forward pass, from Python and by the commands."""

import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, losses, nhwc
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from dit_jax import config as configs
from dit_jax.data import sources
from dit_jax.diffusion.objectives import DDPM
from dit_jax.models import dit
from dit_jax.parallel import layout, sharding
from dit_jax.runtime.errors import UserError
from dit_jax.sampling.generator import Generator, Settings
from dit_jax.sampling.model import choose_labels
from dit_jax.training import initialize
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.step import TrainState, make_train_step
from dit_jax.weights import files as weight_files, published
from dit_jax.weights.checkpoint import Checkpoints

ONE = sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture
def start(network, tmp_path):
    """start("a", num_classes=7) -> (arguments of the new DiT, its params made of the golden weights a)."""

    def run(which, mesh=ONE, seed=0, **changes):
        args, _, _, flat = network(which)
        path = tmp_path / f"{which}.npz"
        weight_files.write(str(path), flat)
        args = dict(args, null_class=True, block="adaln_zero") | changes
        return args, initialize.initial_params(str(path), "ema", args=args, mesh=mesh, seed=seed)[0]

    return run


def without_labels(params):
    return params | {"y_embedder": None}, params["y_embedder"]["embedding"]


@partial(jax.jit, static_argnums=0)
def forward(graphdef, params, x, t, y):
    return nnx.merge(graphdef, params)(x, t, y)


@pytest.mark.parametrize("which", ["a", "b"])
def test_published_outputs_stay(golden, network, start, which):
    """The same geometry: every output. None of the classes: those of the null class. Other classes: its row."""
    z = golden(f"dit_{which}_forward.npz")
    x, t, y, out = nhwc(z["x"]), z["t"], z["y"], nhwc(z["out"])
    args, params = start(which)
    graphdef, null = dit.abstract(**args)[0], args["num_classes"]
    assert_allclose(forward(graphdef, params, x, t, y), out, atol=2e-5)
    expected = forward(graphdef, params, x, t, np.full_like(y, null))
    assert_allclose(expected[y == null], out[y == null], atol=2e-5)
    rest, table = without_labels(params)
    for classes in (0, 3, null + 20):
        args, params = start(which, num_classes=classes)
        if classes == 0:
            assert_array_equal(forward(dit.abstract(**args)[0], params, x, t, np.zeros_like(y)), expected)
        new_rest, new_table = without_labels(params)
        jax.tree.map(assert_array_equal, new_rest, rest)
        assert_array_equal(new_table[classes:], table[null:])
        assert new_table.shape == (classes + 1, args["hidden_size"])
        # The unconditional model leaves in the published format, and comes back.
        flat = published.to_published(params, args)
        inferred = published.infer_args(flat, args["num_heads"])
        assert inferred["num_classes"] == classes and inferred["null_class"]
        assert_array_equal(published.from_published(flat, inferred)["y_embedder"]["embedding"], new_table)


def test_new_rows_are_drawn_as_at_the_start_of_a_run(start):
    table = start("a", num_classes=2000)[1]["y_embedder"]["embedding"]
    assert_allclose([np.mean(table[:-1]), np.std(table[:-1])], [0, 0.02], atol=2e-4)
    assert_array_equal(table, start("a", num_classes=2000)[1]["y_embedder"]["embedding"])
    assert (table[:-1] != start("a", num_classes=2000, seed=1)[1]["y_embedder"]["embedding"][:-1]).all()


def test_another_size_is_the_dit_built_at_that_size(network, start, capsys):
    given, _, old, _ = network("a")
    args, params = start("a", input_size=given["input_size"] * 2)
    grid = given["input_size"] // given["patch_size"]
    assert (
        f"init: position embedding re-made for a {2 * grid} x {2 * grid} grid of tokens (was {grid} x {grid})"
        in capsys.readouterr().out
    )
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, dit.abstract(**args)[1])
    jax.tree.map(assert_array_equal, params, old | {"pos_embed": dit.position_embedding(args["hidden_size"], 2 * grid)})


@pytest.mark.parametrize(
    "there, here, words",
    [
        ((True, 4), (False, 4), "of 4 classes is kept (the null class's row is left out: diffusion.label_dropout=0)"),
        ((False, 4), (True, 4), "of 4 classes is kept (these weights have no null class: its row is drawn anew)"),
        ((False, 4), (True, 0), "re-made for none (these weights have no null class: its row is drawn anew)"),
        ((True, 4), (True, 0), "of 4 classes is re-made for none (the null class's row is kept)"),
        ((True, 0), (True, 3), "of no classes is re-made for 3 (the null class's row is kept)"),
        ((False, 4), (False, 3), "of 4 classes is re-made for 3\n"),
    ],
    ids=str,
)
def test_which_rows_are_kept(capsys, there, here, words):
    there, here = (dict(null_class=null, num_classes=n, hidden_size=8) for null, n in (there, here))
    old = np.arange(1, 1 + there["num_classes"] + there["null_class"])[:, None] * np.ones((1, 8), np.float32)
    tree, where = ({"y_embedder": {"embedding": a}} for a in (old, sharding.replicated(ONE)))
    new = np.asarray(initialize._fit_labels(tree, there, here, where, 0)["y_embedder"]["embedding"])
    assert len(new) == here["num_classes"] + here["null_class"]
    kept = (new == old[:, :1].max()).all(1) if there["null_class"] else np.zeros(len(new), bool)
    assert kept.tolist() == [i >= here["num_classes"] and there["null_class"] for i in range(len(new))]
    if there["num_classes"] == here["num_classes"]:
        assert_array_equal(new[:4], old[:4])
    assert words in capsys.readouterr().out


def test_the_state_lies_on_the_mesh_as_it_would(start, network):
    """Two axes of four devices, tables and embedding re-made: same values, and where the rules put them."""
    mesh = sharding.make_mesh(devices=jax.devices()[:4], data=1, fsdp=2, tensor=2)
    args, params = start("a", mesh=mesh, num_classes=1023, input_size=16)
    shapes = dit.abstract(**args)[1]
    jax.tree.map(
        lambda a, s: None if a.sharding == s else pytest.fail(f"{a.shape}: {a.sharding}"),
        params,
        sharding.state_shardings(shapes, mesh),
    )
    assert params["y_embedder"]["embedding"].sharding.spec == jax.sharding.PartitionSpec("fsdp", None)
    jax.tree.map(assert_array_equal, params, start("a", num_classes=1023, input_size=16)[1])


def test_of_an_unconditional_model_labels_do_not_matter():
    """Whatever they are, also beyond any table: their gradient is that of the null class."""
    args = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=0)
    graphdef, params = dit.abstract(**args)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)
    optimizer, x = make_optimizer(1e-4), rng.normal(size=(4, 4, 4, 1)).astype(np.float32)
    step = jax.jit(
        make_train_step(graphdef, DDPM(), optimizer, seed=0, ema_decay=0.99, label_dropout=0.1, num_classes=0)
    )
    state = TrainState(np.int32(0), params, params, optimizer.init(params))
    zeros, other = (step(state, {"x": x, "y": np.array(y, np.int32)}) for y in ([0, 0, 0, 0], [3, 999, -1, 0]))
    jax.tree.map(assert_array_equal, zeros, other)
    tables = [p["y_embedder"]["embedding"] for p in (zeros[0].params, params)]
    assert np.isfinite(zeros[1]["loss"]) and (tables[0] != tables[1]).all()


def test_labels_are_dropped_at_the_rate_given():
    """They become the null class (paper section 3.1, classifier-free guidance), other ones at each step."""

    class Seen(DDPM):
        def losses(self, network, x, y, drawn):
            null = y == 10
            kept = jnp.where(null, 0, jnp.abs(y - jnp.arange(len(y)) % 10))
            return dict(loss=jnp.zeros(len(y)), null=null, place=null * jnp.arange(len(y)), changed=kept)

    graphdef, params = dit.split(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))  # any network: these losses do not call it
    optimizer, batch = make_optimizer(1e-4), {"x": np.zeros((4000, 1, 1, 1), np.float32), "y": np.arange(4000) % 10}
    step = jax.jit(
        make_train_step(graphdef, Seen(), optimizer, seed=0, ema_decay=0.99, label_dropout=0.1, num_classes=10)
    )
    state = TrainState(jnp.int32(0), params, params, optimizer.init(params))
    state, first = step(state, batch)
    _, second = step(state, batch)
    for seen in (first, second):
        assert 0.085 < seen["null"] < 0.115 and seen["changed"] == 0
    assert first["place"] != second["place"]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden_size=64), "hidden_size is 32 in these weights, but model.hidden_size=64"),
        (dict(depth=3), "depth is 2 in these weights, but model.depth=3"),
        (dict(patch_size=2), "patch_size is 4 in these weights, but model.patch_size=2"),
        (dict(in_channels=1), "in_channels is 3 in these weights, but model.in_channels=1"),
        (dict(block="in_context"), "block is adaln_zero in these weights, but model.block=in_context"),
    ],
)
def test_another_geometry_is_refused(network, tmp_path, change, words):
    args, _, _, flat = network("b")
    path = str(tmp_path / "b.npz")
    weight_files.write(path, flat)
    args = dict(args, null_class=True, block="adaln_zero")
    with pytest.raises(UserError, match=f"^init.weights={path}: {words}"):
        initialize.initial_params(path, "ema", args=args | change, mesh=ONE, seed=0)


def test_weights_that_are_none_are_refused(network, tmp_path):
    args, _, _, flat = network("b")
    args = dict(args, null_class=True, block="adaln_zero")
    name = "blocks.1.mlp.fc1.weight"
    pytest.importorskip("torch")
    for file, content, words in (
        ("short.npz", {k: v for k, v in flat.items() if k != name}, f"{name} is missing"),
        ("wide.npz", flat | {"x_embedder.proj.weight": np.zeros((384, 3, 4, 4), np.float32)}, "hidden_size is 384"),
        ("none.npz", None, "no such file"),
        ("cut.pt", b"PK", "cannot be read"),
        ("empty", b"", ".pt, .npz or .safetensors files"),
    ):
        path = tmp_path / file
        if isinstance(content, dict):
            weight_files.write(str(path), content)
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=f"^init.weights={path}: .*{words}") as e:
            initialize.initial_params(str(path), "ema", args=args, mesh=ONE, seed=0)
        assert str(e.value).count(str(path)) == 1
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="init.weights=.*folder: holds no checkpoints"):
        initialize.initial_params(str(tmp_path / "folder"), "ema", args=args, mesh=ONE, seed=0)


def test_heads_that_no_array_shows_are_the_papers(tmp_path):
    args = dict(
        input_size=8,
        patch_size=4,
        in_channels=1,
        hidden_size=384,
        depth=1,
        num_heads=6,
        num_classes=2,
        null_class=True,
        block="adaln_zero",
    )
    flat = {name: np.zeros(shape, np.float32) for name, shape in published.published_shapes(args).items()}
    path = str(tmp_path / "s.npz")
    weight_files.write(path, flat)
    assert initialize.initial_params(path, "ema", args=args, mesh=ONE, seed=0)[1]["sha256"] == (
        hashlib.sha256(b"".join(a.tobytes() for a in flat.values())).hexdigest()
    )
    with pytest.raises(UserError, match="model.num_heads=8: .* width 384 have 6"):
        initialize.initial_params(path, "ema", args=args | {"num_heads": 8}, mesh=ONE, seed=0)
    # As many rows as classes, and no label dropout: a table without a null class.
    bare = args | {"num_classes": 3, "null_class": False}
    params, _ = initialize.initial_params(path, "ema", args=bare, mesh=ONE, seed=0)
    assert_array_equal(params["y_embedder"]["embedding"], np.zeros((3, 384)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "sample.cfg_scale=4.0: guidance needs classes"),
        ({"sample.cfg_scale": 1.0, "judge.samples": 9}, "judge.samples=9"),
        ({"sample.cfg_scale": 1.0, "init.which": "both"}, "init.which='both': must be ema or raw"),
        ({"model.num_classes": -2}, "model.num_classes=-2"),
        ({"sample.cfg_scale": 1.0}, None),
        ({"sample.every": 0}, None),
    ],
    ids=str,
)
def test_configs_without_classes(changes, words):
    c = configs.paper("DiT-S/8")
    c.update_from_flattened_dict({"model.num_classes": 0, **changes})
    if words:
        with pytest.raises(UserError, match=words):
            configs.resolve(c)
    else:
        args = configs.dit_args(layout.resolve_auto(configs.resolve(c), jax.devices()))
        assert args["num_classes"] == 0 and args["null_class"]


def test_samples_without_classes():
    assert_array_equal([choose_labels(classes, 3, 0, seed=0) for classes in ("balanced", "random")], np.zeros((2, 3)))
    with pytest.raises(UserError, match="--classes=0: this model has no classes"):
        choose_labels("0", 3, 0, seed=0)
    args = dict(
        input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=0, null_class=True
    )
    with pytest.raises(ValueError, match="cfg_scale=1.5: guidance needs classes"):
        Generator(
            args,
            ONE,
            sharding.state_shardings(dit.abstract(**args)[1], ONE),
            objective=DDPM(),
            settings=Settings(0, "ddim", "2", 0.0, 1.5, 0),
            batch_size=2,
        )
    with pytest.raises(ValueError, match="num_classes=0: must be at least 1"):
        dit.abstract(**args | {"null_class": False})


def restore(workdir, which):
    """The newest checkpoint's item -> (arguments of DiT, params, meta)."""
    checkpoints = Checkpoints(str(workdir), read_only=True)
    meta = checkpoints.latest_meta()
    args = configs.dit_args(layout.resolve_auto(meta["config"], jax.devices()[:1]))
    shapes = dit.abstract(**args)[1]
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, sharding.state_shardings(shapes, ONE)
    )
    return args, checkpoints.restore_params(None, which, target)[1], meta


@pytest.mark.slow
def test_a_run_goes_over_to_other_classes_and_another_size(command, uninterrupted, tmp_path):
    """From a run on digits to 5 of them at twice the size; the run resumes without the first one."""
    digits, data, workdir = sources.digits()[0], tmp_path / "data", tmp_path / "run"
    data.mkdir()
    np.save(data / "images.npy", digits.x[digits.y < 5].repeat(2, axis=1).repeat(2, axis=2))
    np.save(data / "labels.npy", digits.y[digits.y < 5])
    flags = [
        *TINY,
        "--config.data.source=arrays",
        f"--config.data.path={data}",
        "--config.model.num_classes=5",
        "--config.model.input_size=16",
        "--config.checkpoint.every=1",
        f"--workdir={workdir}",
        "--config.optimizer.learning_rate=1e-20",
    ]  # nothing moves: a checkpoint shows what the run began with
    status, out, err = command("train", *flags, "--config.steps=1", f"--config.init.weights={uninterrupted}")
    assert status == 0, err
    assert f"init: workdir {uninterrupted}, step 24, which ema" in out
    assert "init: the label table of 10 classes is re-made for 5 (the null class's row is kept)" in out
    assert "init: position embedding re-made for a 8 x 8 grid of tokens (was 4 x 4)" in out
    origin = {"workdir": str(uninterrupted), "step": 24, "which": "ema"}
    args, old, _ = restore(uninterrupted, "ema")
    table = old.pop("y_embedder")["embedding"]
    for which in ("params", "ema"):
        _, new, meta = restore(workdir, which)
        assert meta["init"] == origin
        assert_array_equal(new.pop("y_embedder")["embedding"][5:], table[10:])
        jax.tree.map(assert_array_equal, new, old | {"pos_embed": dit.position_embedding(args["hidden_size"], 8)})
    status, out, err = command("train", *flags, "--config.steps=3")
    assert status == 0 and "resuming from step 1 of 3" in out and "init:" not in out, err
    assert f"changed since the checkpoint: init.weights '{uninterrupted}' -> ''" in out
    assert restore(workdir, "ema")[2]["init"] == origin and np.isfinite(list(losses(workdir).values())).all()


@pytest.mark.slow
def test_a_run_becomes_unconditional(command, uninterrupted, tmp_path):
    """Labels of the data stay unread; a grid while it trains, and samples."""
    workdir = tmp_path / "run"
    status, out, err = command(
        "train",
        *TINY,
        "--config.model.num_classes=0",
        "--config.steps=2",
        "--config.sample.cfg_scale=1",
        "--config.sample.every=2",
        "--config.sample.steps=3",
        f"--config.init.weights={uninterrupted}",
        f"--workdir={workdir}",
    )
    assert status == 0, err
    assert "init: the label table of 10 classes is re-made for none (the null class's row is kept)" in out
    assert (workdir / "samples/00000002.png").exists()
    status, _, err = command(
        "sample", f"--workdir={workdir}", "--num=9", "--cfg_scale=1", "--sampler=ddim", "--steps=3"
    )
    assert status == 0, err
    assert Image.open(workdir / "out/grid.png").size == (3 * 98 + 2, 3 * 98 + 2)  # no classes, no names
