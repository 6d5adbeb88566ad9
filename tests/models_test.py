import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from dit_jax.models import blocks, dit, flops
from dit_jax.models.blocks import BLOCKS
from dit_jax.weights.published import published_shapes

SMALL = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=5)


def random_like(params, seed=0):
    """Every parameter non-zero: at its initial values adaLN-Zero puts out nothing but zeros."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])


def inputs(args, batch=4):
    rng = np.random.default_rng(0)
    return (
        rng.standard_normal((batch, args["input_size"], args["input_size"], args["in_channels"]), np.float32),
        np.array([0, 1, 500, 999]),
        np.array([0, 4, 5, 2]),
    )


@pytest.mark.parametrize("block", BLOCKS)
def test_scanned_and_unrolled_agree(block):
    x, t, y = inputs(SMALL)
    (graphdef, params), (unrolled, _) = (dit.abstract(**SMALL, block=block, scan=scan) for scan in (True, False))
    params = random_like(params)
    out, other = (jax.jit(lambda p, g=g: nnx.merge(g, p)(x, t, y))(params) for g in (graphdef, unrolled))
    assert out.shape == (4, 8, 8, 8) and out.std() > 0.1
    assert_allclose(other, out, atol=1e-4)


def test_gradients_do_not_depend_on_scan_and_remat():
    x, t, y = inputs(SMALL)

    def gradients(**switches):
        graphdef, params = dit.abstract(**SMALL, **switches)
        return jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(x, t, y)).mean()))(random_like(params))

    base = gradients()
    for switches in (dict(scan=False, remat="dots"), dict(remat="full")):
        for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(gradients(**switches))):
            assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max()) + 1e-7)


@pytest.mark.parametrize("block", BLOCKS)
def test_forward_mode_against_finite_differences(block, monkeypatch):
    args = dict(SMALL, hidden_size=16, input_size=4, block=block, dtype=jnp.float64)
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)  # the network fixes some of its dtypes
        graphdef, params = dit.abstract(**args)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), random_like(params))
        x, _, y = inputs(args)
        x, t = jnp.asarray(x, jnp.float64), jnp.array([0.0, 0.2, 0.5, 1.0])
        dx, dt, h = jnp.cos(7 * x), jnp.array([1.0, -0.5, 0.3, 0.2]), 1e-6
        network = jax.jit(lambda x, t: nnx.merge(graphdef, params)(x, t, y))
        _, tangent = jax.jvp(network, (x, t), (dx, dt))
        difference = (network(x + h * dx, t + h * dt) - network(x - h * dx, t - h * dt)) / (2 * h)
        assert tangent.dtype == np.float64 and tangent.std() > 0.1
        assert_allclose(tangent, difference, rtol=0, atol=1e-7 * float(jnp.abs(difference).max()))


@pytest.mark.slow
def test_gradient_through_forward_mode(monkeypatch):
    """The loss of MeanFlow: the velocity u and, under stop_gradient, its total derivative in time."""
    x, t, y = inputs(SMALL)

    def loss_and_gradients(**switches):
        graphdef, params = dit.abstract(**SMALL, **switches)

        def loss(params):
            network = nnx.merge(graphdef, params)
            u, du_dt = jax.jvp(lambda x, t: network(x, t, y), (x, t.astype(np.float32)), (-x, np.ones(4, np.float32)))
            return jnp.square(u - jax.lax.stop_gradient(0.5 * du_dt)).mean()

        return jax.jit(jax.value_and_grad(loss))(random_like(params))

    with monkeypatch.context() as plain:
        plain.setattr(blocks, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
        plain.setattr(blocks, "matmul", jnp.matmul)
        base = loss_and_gradients()
    for switches in (dict(), dict(remat="dots"), dict(remat="full"), dict(scan=False, remat="dots")):
        for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(loss_and_gradients(**switches))):
            assert_allclose(b, a, rtol=0, atol=1e-4 * float(jnp.abs(a).max()) + 1e-7)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jacfwd(f, (0, 1)),
        lambda f: jax.jacrev(f, (0, 1)),
        lambda f: jax.jacfwd(jax.jacrev(f, (0, 1)), (0, 1)),
        lambda f: jax.jacrev(jax.jacfwd(f, (0, 1)), (0, 1)),
        lambda f: jax.jacrev(jax.jacrev(f, (0, 1)), (0, 1)),
        lambda f: jax.jacrev(jax.vmap(f, (1, None)), (0, 1)),
        lambda f: jax.vmap(jax.jacrev(f, 1), (0, None)),
    ],
    ids=["forward", "reverse", "forward-reverse", "reverse-forward", "reverse-reverse", "reverse-vmap", "vmap-reverse"],
)
def test_written_derivatives_under_transformations(transform):
    x, kernel = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (4, 5))
    ours = jax.jit(transform(lambda x, kernel: jnp.sin(blocks.matmul(blocks.gelu(x), kernel))))(x, kernel)
    plain = jax.jit(transform(lambda x, kernel: jnp.sin(jax.nn.gelu(x, approximate=True) @ kernel)))(x, kernel)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert_allclose(a, b, atol=1e-5)


def test_what_the_backward_pass_keeps():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (4, 5))

    def kept(function, *args):
        return jax.tree.leaves(jax.vjp(function, *args)[1])

    def in_forward_mode(x):
        return jax.jvp(blocks.gelu, (x,), (jnp.ones_like(x),))[0]

    for function in (blocks.gelu, in_forward_mode):
        (residual,) = kept(function, x)
        assert_array_equal(residual, x)
    assert sorted(a.shape for a in kept(blocks.matmul, x, kernel)) == [x.shape, kernel.shape]
    # remat "dots" keeps the product.
    under_dots = jax.checkpoint(lambda x, kernel: jnp.sin(blocks.matmul(x, kernel)), policy=dit.REMAT["dots"])
    assert any(a.shape == (2, 3, 5) for a in kept(under_dots, x, kernel))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_matters(block):
    graphdef, params = dit.abstract(**SMALL, block=block)
    x, t, y = inputs(SMALL)
    # Not the first rows of the label table, which these labels do not touch; not the frozen position embedding.
    grads = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(x, t, y)).sum()))(random_like(params))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(grad.any()) != (path[-1].key == "pos_embed"), jax.tree_util.keystr(path)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_second_time_and_a_head_without_variance(block):
    """MeanFlow's network: the second time matters, and all else is drawn as without it."""
    args = dict(SMALL, block=block, learn_sigma=False)
    graphdef, params = dit.abstract(**args, second_time=True)
    x, t, y = inputs(args)
    t, h, params = t / 999, np.array([0, 0.5, 0, 1]), random_like(params)
    out = jax.jit(lambda p, h: nnx.merge(graphdef, p)(x, t, y, h))(params, h)
    assert out.shape == x.shape and out.dtype == jnp.float32
    assert np.abs(out - nnx.merge(graphdef, params)(x, t, y, 0 * h))[h > 0].max() > 1e-4
    grads = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(x, t, y, h)).sum()))(params)
    assert all(bool(grad.any()) for grad in jax.tree.leaves(grads["h_embedder"]))
    drawn, plain = (dit.split(dit.DiT(**args, second_time=second, rngs=nnx.Rngs(0)))[1] for second in (True, False))
    assert np.std(drawn.pop("h_embedder")["fc1"]["kernel"]) > 0.01
    jax.tree.map(assert_array_equal, drawn, plain)
    with pytest.raises(ValueError, match="h is missing: this network takes a second time"):
        nnx.merge(graphdef, params)(x, t, y)
    graphdef, params = dit.abstract(**args)
    with pytest.raises(ValueError, match="h is given: this network takes no second time"):
        nnx.merge(graphdef, random_like(params))(x, t, y, h)


def test_initial_values():
    _, params = dit.split(
        dit.DiT(**dit.model_args("DiT-S/8"), input_size=32, in_channels=4, num_classes=1000, rngs=nnx.Rngs(0))
    )
    blocks = params["blocks"]
    for zero in (
        blocks["adaLN_modulation"],
        params["final_layer"]["linear"],
        params["final_layer"]["adaLN_modulation"],
    ):
        assert not zero["kernel"].any() and not zero["bias"].any()
    # Xavier-uniform of the matrix as a whole: qkv has fan-in 384 and fan-out 1152, the patches 256 and 384.
    for kernel, fan in (
        (blocks["attn"]["qkv"]["kernel"], 384 + 1152),
        (blocks["attn"]["proj"]["kernel"], 384 + 384),
        (blocks["mlp"]["fc1"]["kernel"], 384 + 1536),
        (params["x_embedder"]["kernel"], 256 + 384),
    ):
        bound = np.sqrt(6 / fan)
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.01)
    for table in (params["y_embedder"]["embedding"], params["t_embedder"]["fc1"]["kernel"]):
        assert_allclose(np.std(table), 0.02, rtol=0.02)
    assert not np.array_equal(blocks["mlp"]["fc1"]["kernel"][0], blocks["mlp"]["fc1"]["kernel"][1])


def test_bfloat16_compute_keeps_float32_parameters_and_is_near():
    graphdef, params = dit.abstract(**SMALL)
    half, _ = dit.abstract(**SMALL, dtype=jnp.bfloat16)
    params = random_like(params)
    out, near = (jax.jit(lambda p, g=g: nnx.merge(g, p)(*inputs(SMALL)))(params) for g in (graphdef, half))
    assert near.dtype == jnp.float32
    error = np.abs(near - out).mean() / np.abs(out).mean()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(patch_size=3), "patch_size=3 does not divide input_size=8"),
        (dict(num_heads=5), "num_heads=5 does not divide hidden_size=32"),
        (dict(block="adaln-zero"), "unknown block design 'adaln-zero'"),
        (dict(remat="some"), "unknown remat policy 'some'"),
        (dict(depth=0), "depth=0"),
    ],
)
def test_impossible_geometry_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        dit.abstract(**{**SMALL, **change})


def test_published_names_and_shapes(golden):
    for name, shapes in golden("full_size_shapes.npz").items():
        args = dict(dit.model_args(name.replace("_", "/")), input_size=32, in_channels=4, num_classes=1000)
        expected = {k: tuple(v) for k, v in json.loads(str(shapes)).items()}
        ours = published_shapes(args)
        assert ours == expected and list(ours) == list(expected)
        assert sum(np.prod(s) for s in expected.values()) == flops.num_params(**args)[0]


def test_the_papers_table():
    models = flops.paper_models()
    assert models.keys() == flops.PAPER.keys() and len(dit.MODELS) == 12
    for name, (gflops, millions) in flops.PAPER.items():
        assert f"{flops.paper_gflops(**models[name]):.2f}" == gflops, name
        assert round(flops.num_params(**models[name])[1] / 1e6) == millions, name
    assert flops.num_params(**models["DiT-XL/2"])[0] == 675_129_632


@pytest.mark.parametrize("second_time", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_multiply_adds_against_xla(block, second_time):
    """XLA counts two for each multiply-add, and also the elementwise operations."""
    switches = dict(second_time=True, learn_sigma=False) if second_time else {}
    args = dict(SMALL, hidden_size=256, depth=2, block=block, scan=False, **switches)
    graphdef, params = dit.abstract(**args)
    x, t, y = inputs(args, batch=1)
    given = (x, t[:1], y[:1], t[:1])[: 4 if second_time else 3]
    cost = jax.jit(lambda p: nnx.merge(graphdef, p)(*given)).lower(params).compile().cost_analysis()
    ratio = cost["flops"] / (2 * flops.macs(**args))
    assert 1 < ratio < 1.04
    if block == "adaln_zero":
        assert sum(np.prod(shape) for shape in published_shapes(args).values()) == flops.num_params(**args)[0]


def test_position_embedding_rows_and_columns():
    table = dit.position_embedding(8, 3).reshape(3, 3, 8)
    assert_array_equal(table[0, :, :4], table[2, :, :4])  # the first half encodes the column
    assert_array_equal(table[:, 0, 4:], table[:, 2, 4:])
    assert_allclose(table[1, 2, 0], np.sin(2.0), rtol=1e-6)
