"""A batch in parts: the same run for any number of parts, on any mesh; and how many are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from objectives_test import CHANGES
from train_test import tiny

from dit_jax import config as configs
from dit_jax.data import pipeline, sources
from dit_jax.parallel import layout, sharding
from dit_jax.runtime.errors import UserError
from dit_jax.training import setup
from dit_jax.training.accumulate import gradient


def test_the_gradient_in_parts_is_the_whole_batchs_and_no_example_travels():
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    rng = np.random.default_rng(0)
    x, y, w = (rng.normal(size=shape).astype(np.float32) for shape in ((24, 3, 5), (24,), (3, 5)))
    examples = jax.device_put((x, y), sharding.batch_sharding(mesh))

    def loss_fn(w, examples):
        x, y = examples
        errors = jnp.square(jnp.sum(x * w, axis=(1, 2)) - y)
        return errors.mean(), dict(loss=errors.mean())

    error = np.einsum("bij,ij->b", x.astype(np.float64), w) - y
    for parts in (1, 2, 3, 6):
        grads, metrics = jax.jit(lambda w, e: gradient(loss_fn, w, e, parts=parts, mesh=mesh))(jnp.asarray(w), examples)
        assert_allclose(grads, np.einsum("b,bij->ij", 2 * error, x) / 24, rtol=1e-5)
        assert_allclose(metrics["loss"], np.square(error).mean(), rtol=1e-6)
    split = jax.jit(lambda x: sharding.split_parts(x, 3, mesh))
    program = split.lower(examples[0]).compile().as_text()
    assert not any(op in program for op in ("all-", "collective-permute", "reduce-scatter"))
    parts = np.asarray(split(examples[0]))
    assert parts.shape == (3, 8, 3, 5)
    assert_array_equal(parts[1], x[[2, 3, 8, 9, 14, 15, 20, 21]])  # of each device its second two examples


ONE, TWO, FOUR = (1, {}), (2, dict(data=2)), (4, dict(data=1, fsdp=2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, cells",
    [
        ("ddpm-min-snr", [(ONE, 1), (ONE, 2), (TWO, 4), (FOUR, 2), (FOUR, 4)]),
        ("flow", [(ONE, 1), (FOUR, 4)]),
        ("meanflow", [(ONE, 1), (TWO, 4)]),
    ],
)
def test_any_number_of_parts_trains_the_same_run(name, cells):
    source, runs = sources.digits()[0], []
    for (devices, sizes), parts in cells:
        changes = {"batch_size": 16, "model.remat": "none", "model.scan": parts != 4}  # blocks are summed apart if not
        config = tiny(**changes, accumulate=parts, **CHANGES[name])
        mesh = sharding.make_mesh(devices=jax.devices()[:devices], **sizes)
        init, step, _ = setup.make_programs(config, mesh)
        state, values, split = init(jax.random.key(0)), [], sharding.batch_sharding(mesh)
        for s in range(6):
            batch = pipeline.global_batch(source, s, seed=0, flip=False, batch_size=16, sharding=split)
            state, metrics = step(state, batch)
            values.append([float(metrics[key]) for key in sorted(metrics)])
        runs.append(values)
    for cell, values in zip(cells, runs):
        assert_allclose(values, runs[0], rtol=1e-3, err_msg=str(cell))


def test_what_does_not_divide_is_one_line():
    config = tiny(batch_size=24, accumulate=5)
    with pytest.raises(UserError, match="accumulate=5: does not divide the 12 examples") as e:
        setup.check_batch(config, sharding.make_mesh(data=2, devices=jax.devices()[:2]))
    assert "\n" not in str(e.value)


def decided(model, devices, **changes):
    c = configs.paper(model)
    c.update_from_flattened_dict(changes)
    resolved = layout.resolve_auto(configs.resolve(c), devices)
    return resolved["accumulate"], resolved["model"]["remat"]


def test_how_many_parts_are_chosen_on_cpu():
    cpu = jax.devices()[:1]
    parts, remat = decided("DiT-S/2", cpu)
    assert 4 <= parts <= 64 and remat == "dots"
    assert decided("DiT-S/2", cpu, accumulate=2) == (2, "dots")
    assert decided("DiT-S/2", cpu, batch_size=8)[0] == 1
    assert decided("DiT-S/2", jax.devices()[:4])[0] == parts  # they share the memory
    assert decided("DiT-XL/2", jax.devices()[:4])[0] == 64  # one example of each device
