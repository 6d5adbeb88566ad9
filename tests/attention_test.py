"""Attention by kernels: against XLA's, in values and derivatives; and which one is chosen for which devices."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models_test import SMALL, inputs, random_like
from numpy.testing import assert_allclose

from dit_jax import config as configs
from dit_jax.data import pipeline, sources
from dit_jax.models import attention, blocks, derivatives, dit
from dit_jax.parallel import layout, sharding
from dit_jax.training import setup


def by_xla(qkv):
    """In the layout of the kernel, (B, H, 3, K, N)."""
    return attention.self_attention(qkv.transpose(0, 4, 1, 2, 3)).transpose(0, 2, 3, 1)


def by_kernel(qkv):
    return attention.pallas_attention(qkv, blocks.NO_SHARDING)


def values_and_gradients(function, qkv, g):
    out, vjp = jax.vjp(function, qkv)
    return out, vjp(g)[0]


def drawn(tokens, width, dtype=np.float32):
    rng = np.random.default_rng(tokens)
    return (jnp.asarray(rng.standard_normal((2, 2, *shape, tokens)), dtype) for shape in ((3, width), (width,)))


@pytest.mark.parametrize("tokens, width", [(256, 72), (258, 64)])
def test_the_kernel_against_xla(tokens, width, monkeypatch):
    """Also with several blocks of queries, the last one short."""
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 128 * tokens)
    qkv, g = drawn(tokens, width)
    out, grad = jax.jit(partial(values_and_gradients, by_kernel))(3 * qkv, g)
    expected, expected_grad = jax.jit(partial(values_and_gradients, by_xla))(3 * qkv, g)
    assert_allclose(out, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    assert_allclose(grad, expected_grad, atol=1e-5 * float(jnp.abs(expected_grad).max()))


def test_in_bfloat16_the_kernel_is_as_exact_as_xla():
    """Softmax and sums are float32: the mean error against float32 is that of XLA's, with the same roundings."""
    qkv, g = drawn(256, 72, jnp.bfloat16)
    exact = jax.jit(partial(values_and_gradients, by_xla))(qkv.astype(np.float32), g.astype(np.float32))
    rounded = {"xla_allow_excess_precision": False}  # on a CPU XLA leaves roundings out otherwise
    kernel, xla = (
        jax.jit(partial(values_and_gradients, f), compiler_options=rounded)(qkv, g) for f in (by_kernel, by_xla)
    )
    for ours, theirs, value in zip(kernel, xla, exact):
        ours, theirs = (float(jnp.abs(a.astype(np.float32) - value).mean()) for a in (ours, theirs))
        assert 0 < ours < 1.05 * theirs < 0.01 * float(jnp.abs(value).mean())


def loss_and_gradients(sharding=blocks.NO_SHARDING, jvp=False, **switches):
    x, t, y = inputs(SMALL)
    graphdef, params = dit.abstract(**SMALL, sharding=sharding, **switches)

    def loss(params):
        network = nnx.merge(graphdef, params)
        if not jvp:
            return jnp.square(network(x, t, y)).mean()
        u, du = jax.jvp(lambda x: network(x, t, y), (x,), (-x,))
        return jnp.square(u - jax.lax.stop_gradient(0.5 * du)).mean()

    return jax.jit(jax.value_and_grad(loss))(random_like(params))


def assert_same(a, b, tolerance=2e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert_allclose(x, y, atol=tolerance * float(jnp.abs(x).max()) + 1e-7)


@pytest.mark.slow
def test_the_network_with_the_kernel_on_a_mesh():
    """With tensor-parallel heads."""
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    across = sharding.MeshSharding(mesh, SMALL["num_heads"])
    assert_same(loss_and_gradients(across, attention="pallas", remat="dots"), loss_and_gradients())


@pytest.mark.slow
def test_forward_mode_is_xlas_and_says_so(capsys):
    attention._say_xla.cache_clear()
    assert_same(loss_and_gradients(attention="pallas"), loss_and_gradients())
    assert capsys.readouterr().out == ""  # reverse mode is the kernel's
    assert_same(loss_and_gradients(attention="pallas", jvp=True), loss_and_gradients(jvp=True))
    assert capsys.readouterr().out.count("forward mode is XLA's") == 1


@pytest.mark.parametrize("remat, kernels", [("dots", 2), ("full", 3)])
def test_what_dots_keeps_is_not_made_again(remat, kernels):
    """A kernel for each pass, and one more where the forward pass is made again."""
    graphdef, params = dit.abstract(**SMALL, attention="pallas", remat=remat)
    x, t, y = inputs(SMALL)
    program = jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graphdef, p)(x, t, y).sum()))(random_like(params))
    assert str(program).count("pallas_call[") == 2 * kernels  # each once to be interpreted, and once to be compiled


def test_cudnn_is_given_a_forward_mode(monkeypatch):
    """With a function in its place that, like it, has a reverse mode only and keeps an array of its own."""
    runs = []

    @jax.custom_vjp
    def fake(q, k, v):
        return forward(q, k, v)[0]

    def forward(q, k, v):
        runs.append(0)
        out, vjp = jax.vjp(lambda *qkv: attention.self_attention(jnp.stack(qkv, 3)), q, k, v)
        return out, vjp

    fake.defvjp(forward, lambda vjp, g: vjp(g))
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *qkv, implementation: fake(*qkv))
    switches = dict(attention="cudnn", remat="dots")
    assert_same(loss_and_gradients(**switches), loss_and_gradients())
    assert_same(loss_and_gradients(**switches, jvp=True), loss_and_gradients(jvp=True))
    assert runs


def test_a_forward_mode_keeps_what_the_reverse_mode_kept():
    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (x * x, 2 * jnp.sin(x)), lambda kept, g: (kept * g,))  # no derivative: to be told apart
    forward = (lambda x, dx: 3 * x * dx,)
    f = partial(derivatives.with_forward_mode, square, forward=forward, name="square")
    x = jnp.arange(3.0)
    assert_allclose(jax.grad(lambda x: f(x).sum())(x), 2 * jnp.sin(x))
    assert_allclose(jax.jvp(f, (x,), (jnp.ones(3),))[1], 3 * x)
    assert_allclose(jax.jit(jax.vmap(jax.grad(f)))(x), 2 * jnp.sin(x))


@pytest.mark.slow
def test_training_with_and_without_the_kernel():
    """The same losses to bfloat16's rounding; other seeds differ by far more."""
    c = configs.paper("")
    c.update_from_flattened_dict(
        {"model.patch_size": 1, "model.depth": 2, "model.hidden_size": 64, "model.num_heads": 4}
        | {"model.input_size": 8, "model.in_channels": 1, "model.num_classes": 10, "model.dtype": "bfloat16"}
        | {"data.source": "digits", "batch_size": 8}
    )
    config = layout.resolve_auto(configs.resolve(c), jax.devices()[:2])
    source, mesh = sources.digits()[0], sharding.make_mesh(data=2, devices=jax.devices()[:2])
    losses = {}
    for name, seed in (("xla", 0), ("pallas", 0), ("xla", 1)):
        config["model"]["attention"], config["seed"] = name, seed
        init, step, _ = setup.make_programs(config, mesh)
        state, losses[name, seed] = init(jax.random.key(0)), []
        for s in range(6):
            batch = pipeline.global_batch(
                source, s, seed=0, flip=False, batch_size=8, sharding=sharding.batch_sharding(mesh)
            )
            state, metrics = step(state, batch)
            losses[name, seed].append([float(metrics["loss"]), float(metrics["grad_norm"])])
    assert_allclose(losses["pallas", 0], losses["xla", 0], rtol=2**-8)
    assert np.abs(np.array(losses["xla", 1]) / losses["xla", 0] - 1).max() > 2**-5


def device(platform, kind="", capability="9.0"):
    return [SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)]


XL2 = dict(dit.model_args("DiT-XL/2"), input_size=32, in_channels=4, dtype="bfloat16")
H100, V4 = device("gpu", "NVIDIA H100"), device("tpu", "TPU v4")


@pytest.mark.parametrize(
    "devices, changes, chosen",
    [
        (V4, {}, "pallas"),
        (device("tpu", "TPU v3"), {}, "xla"),
        (V4, dict(patch_size=8), "xla"),  # 16 tokens
        (V4, dict(dtype="float32"), "xla"),
        (H100, {}, "cudnn"),
        (H100, dict(dtype="float32"), "xla"),
        (H100, dict(num_heads=32), "xla"),  # 36 wide
        (device("gpu", "NVIDIA T4", "7.5"), {}, "xla"),
        (device("gpu", "AMD MI300X", "gfx942"), {}, "xla"),
        (device("cpu"), {}, "xla"),
        (V4, dict(attention="xla"), "xla"),
    ],
)
def test_the_attention_of_devices(devices, changes, chosen, capsys):
    assert layout.choose_attention(XL2 | changes, devices) == chosen
    assert capsys.readouterr().out == ""


def test_another_attention_than_asked_for_is_said(capsys):
    for devices, asked in ((device("cpu"), "pallas"), (V4, "cudnn"), (device("tpu", "TPU v3"), "pallas")):
        assert layout.choose_attention(XL2 | dict(attention=asked), devices) == "xla"
        assert f"model.attention={asked}: is for " in capsys.readouterr().out
    assert layout.choose_attention(XL2, V4, objective="meanflow") == "xla"
    assert "meanflow needs forward mode" in capsys.readouterr().out
    assert layout.choose_attention(XL2 | dict(attention="pallas"), V4, objective="meanflow") == "pallas"
    assert set(layout.KERNELS) | {"xla"} == set(attention.ATTENTION)


def test_an_older_run_has_no_such_field():
    config = configs.resolve(configs.paper())
    del config["model"]["attention"]
    assert configs.stored_problem(config) is None and not configs.is_fixed("model.attention", "xla", "pallas")
    assert layout.resolve_auto(config, jax.devices())["model"]["attention"] == "xla"
