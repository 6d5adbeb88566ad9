"""The optimizer's recipes, against PyTorch and against NumPy in float64; Muon on a mesh and across a resume."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import nhwc
from flax import nnx
from numpy.testing import assert_allclose
from train_test import tiny

from dit_jax.data import pipeline, sources
from dit_jax.diffusion import ddpm
from dit_jax.diffusion.process import linear_schedule
from dit_jax.parallel import sharding
from dit_jax.runtime.errors import UserError
from dit_jax.training import setup
from dit_jax.training.accumulate import gradient
from dit_jax.training.optimizer import make_optimizer
from dit_jax.training.step import TrainState, from_items, to_items, update
from dit_jax.weights.checkpoint import Checkpoints


def test_clipping_warmup_and_cosine_against_pytorch(golden, network):
    """The three golden steps, with a clip that bites: torch.optim.AdamW is given the same gradients."""
    torch = pytest.importorskip("torch")
    _, graphdef, params, _ = network("a")
    z, clip, warmup, steps, peak, decay = golden("train_3_steps.npz"), 0.05, 2, 4, 1e-4, 0.1
    optimizer = make_optimizer(peak, weight_decay=decay, warmup=warmup, schedule="cosine", steps=steps)
    state = TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

    @jax.jit
    def step(state, x0, t, y, noise):
        def loss_fn(params, _):
            model = nnx.merge(graphdef, params)
            losses = ddpm.training_losses(linear_schedule(1000), lambda x, t: model(x, t, y), x0, t, noise)
            return losses["loss"].mean(), {}

        grads, metrics = gradient(loss_fn, state.params, ())
        return grads, *update(state, grads, metrics, optimizer, 0.9, clip)

    paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(params)[0])
    tensors = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for leaf in leaves]
    frozen = [path[-1].key == "pos_embed" for path in paths]
    groups = [[t for t, f in zip(tensors, frozen) if f == kind] for kind in (False, True)]
    oracle = torch.optim.AdamW(
        [dict(params=groups[0]), dict(params=groups[1], weight_decay=0)], peak, weight_decay=decay
    )

    def factor(n):
        falls = 0.5 * (1 + math.cos(math.pi * (n - warmup) / (steps - warmup))) if n > warmup else 1
        return min(1, (n + 1) / warmup) * falls

    rates = torch.optim.lr_scheduler.LambdaLR(oracle, factor)
    for i in range(4):  # the golden ones, and the first once more, where the rate falls
        i %= 3
        grads, state, metrics = step(state, nhwc(z["x0"][i]), z["t"][i], z["y"][i], nhwc(z["noise"][i]))
        for tensor, grad in zip(tensors, jax.tree.leaves(grads)):
            tensor.grad = torch.tensor(np.array(grad))
        norm = float(torch.nn.utils.clip_grad_norm_(tensors, clip))
        assert norm > 2 * clip
        assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        oracle.step()
        rates.step()
    for path, start, leaf, tensor in zip(paths, leaves, jax.tree.leaves(state.params), tensors):
        error, moved = np.abs(leaf - tensor.detach().numpy()), np.abs(leaf - start).max()
        assert error.max() <= 1e-3 * moved + 4 * np.spacing(np.abs(leaf).max()), (path, error.max(), moved)


def newton_schulz(x):
    """Five steps towards the nearest matrix of orthogonal rows, float64: Jordan, Muon, 2024."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x


def test_muon_treats_each_block_alone_and_the_rest_is_adamw():
    rng, beta, rate, decay = np.random.default_rng(0), 0.95, 1e-2, 0.1
    shapes = {"kernel": (3, 8, 12), "bias": (3, 12)}
    blocks = {"fc1": {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}}
    params = {
        "blocks": {"mlp": blocks},
        "final_layer": {"linear": {"kernel": rng.normal(size=(8, 4)).astype(np.float32)}},
    }
    muon, adamw = (make_optimizer(rate, weight_decay=decay, name=name) for name in ("muon", "adamw"))
    states, trained = [o.init(params) for o in (muon, adamw)], [params, params]
    expected, momentum = blocks["fc1"]["kernel"].astype(np.float64), np.zeros((3, 8, 12))
    for step in range(1, 4):
        grads = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)
        for i, optimizer in enumerate((muon, adamw)):
            updates, states[i] = optimizer.update(grads, states[i], trained[i])
            trained[i] = jax.tree.map(jnp.add, trained[i], updates)
        g = grads["blocks"]["mlp"]["fc1"]["kernel"].astype(np.float64)
        momentum = beta * momentum + (1 - beta) * g
        ahead = beta * momentum / (1 - beta ** (step + 1)) + (1 - beta) * g / (1 - beta**step)
        orthogonal = np.stack([newton_schulz(block) for block in ahead])
        expected = expected - rate * (0.2 * math.sqrt(12) * orthogonal + decay * expected)
    kernel = trained[0]["blocks"]["mlp"]["fc1"].pop("kernel")
    trained[1]["blocks"]["mlp"]["fc1"].pop("kernel")
    assert_allclose(kernel, expected, atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, *trained)


def test_muons_first_step_is_pytorchs():
    """Later ones differ: optax corrects the bias of the momentum. PyTorch iterates in bfloat16."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    kernels, grads = rng.normal(size=(2, 3, 8, 12)).astype(np.float32)
    tensors = [torch.nn.Parameter(torch.tensor(kernel.T.copy())) for kernel in kernels]
    for tensor, grad in zip(tensors, grads):
        tensor.grad = torch.tensor(grad.T.copy())
    torch.optim.Muon(tensors, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw").step()
    params = {"blocks": {"attn": {"qkv": {"kernel": jnp.asarray(kernels)}}}}
    optimizer = make_optimizer(0.1, weight_decay=0.3, name="muon")
    updates, _ = optimizer.update(jax.tree.map(lambda _: grads, params), optimizer.init(params), params)
    moved = np.stack([tensor.detach().numpy().T for tensor in tensors]) - kernels
    assert_allclose(updates["blocks"]["attn"]["qkv"]["kernel"], moved, atol=0.05 * moved.std())


@pytest.mark.slow
def test_muon_resumes_to_the_bit_and_on_another_mesh(tmp_path):
    recipe = {"optimizer.name": "muon", "optimizer.clip": 0.5, "optimizer.warmup": 2, "optimizer.schedule": "cosine"}
    config, source, saved = tiny(**recipe, accumulate=2, steps=9), sources.digits()[0], Checkpoints(str(tmp_path))
    meta, losses = {"config": config, "data": "digits", "train_seconds": 0.0}, {}
    programs = {}
    for name, devices, sizes in (("whole", 1, {}), ("resumed", 1, {}), ("elsewhere", 4, dict(fsdp=2, tensor=2))):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices], **sizes)
        init, step, target = programs[devices] = programs.get(devices) or setup.make_programs(config, mesh)
        restored = saved.restore_latest(to_items(target), lambda meta: None)
        state = from_items(restored[0]) if restored else init(jax.random.key(0))
        assert state.step == (4 if restored else 0) and bool(restored) == (name != "whole")
        for s in range(int(state.step), 6):
            batch = pipeline.global_batch(
                source, s, seed=0, flip=False, batch_size=8, sharding=sharding.batch_sharding(mesh)
            )
            state, metrics = step(state, batch)
            losses[name] = [float(metrics[key]) for key in ("loss", "grad_norm", "param_norm")]
            if not restored and s == 3:
                saved.save(4, to_items(state), meta)
                saved.wait()
    assert losses["resumed"] == losses["whole"]
    assert_allclose(losses["elsewhere"], losses["whole"], rtol=1e-4)


def test_what_may_change_on_resume(capsys):
    before = tiny()
    check = setup.check_same_run(tiny(**{"optimizer.clip": 1.0, "optimizer.schedule": "cosine", "accumulate": 2}), "x")
    check({"config": before, "data": "x"})
    assert "changed since the checkpoint: accumulate 1 -> 2" in (out := capsys.readouterr().out)
    assert "optimizer.clip 0.0 -> 1.0" in out and "optimizer.schedule 'constant' -> 'cosine'" in out
    older = before | {"optimizer": {k: before["optimizer"][k] for k in ("learning_rate", "b1", "b2", "eps")}}
    with pytest.raises(UserError, match=r"optimizer\.name \('adamw' there, 'muon' here\)"):
        setup.check_same_run(tiny(**{"optimizer.name": "muon"}), "x")({"config": older, "data": "x"})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"optimizer.name": "sgd"}, "optimizer.name='sgd': must be adamw or muon"),
        ({"optimizer.schedule": "linear"}, "optimizer.schedule='linear': must be constant or cosine"),
        ({"optimizer.clip": -1.0}, "optimizer.clip=-1.0: must be 0 or more"),
        ({"optimizer.warmup": 1200, "optimizer.schedule": "cosine"}, "optimizer.warmup=1200: must be less than steps"),
        ({"accumulate": 0}, "accumulate=0: must be at least 1, or unset"),
    ],
)
def test_fields_that_cannot_be_are_one_line(changes, words):
    with pytest.raises(UserError) as e:
        tiny(**changes)
    assert words in str(e.value) and "\n" not in str(e.value)
