import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from dit_jax.models import dit, flops
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
def test_every_parameter_matters(block):
    graphdef, params = dit.abstract(**SMALL, block=block)
    x, t, y = inputs(SMALL)
    # Not the first rows of the label table, which these labels do not touch; not the frozen position embedding.
    grads = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(x, t, y)).sum()))(random_like(params))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(grad.any()) != (path[-1].key == "pos_embed"), jax.tree_util.keystr(path)


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


@pytest.mark.parametrize("block", BLOCKS)
def test_multiply_adds_against_xla(block):
    """XLA counts two for each multiply-add, and also the elementwise operations."""
    args = dict(SMALL, hidden_size=256, depth=2, block=block, scan=False)
    graphdef, params = dit.abstract(**args)
    x, t, y = inputs(args, batch=1)
    cost = jax.jit(lambda p: nnx.merge(graphdef, p)(x, t[:1], y[:1])).lower(params).compile().cost_analysis()
    ratio = cost["flops"] / (2 * flops.macs(**args))
    assert 1 < ratio < 1.04


def test_position_embedding_rows_and_columns():
    table = dit.position_embedding(8, 3).reshape(3, 3, 8)
    assert_array_equal(table[0, :, :4], table[2, :, :4])  # the first half encodes the column
    assert_array_equal(table[:, 0, 4:], table[:, 2, 4:])
    assert_allclose(table[1, 2, 0], np.sin(2.0), rtol=1e-6)
