"""Networks of SiT and MeanFlow with weights of the published names, against the published code (golden/flow)."""

import json

import jax
import numpy as np
import pytest
from conftest import GOLDEN, nhwc
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from dit_jax.models import dit
from dit_jax.weights import published


@pytest.fixture(scope="module")
def flow():
    return lambda name: np.load(GOLDEN / "flow" / name)


def apply(args, params, *inputs):
    graphdef = dit.abstract(**args)[0]
    return np.asarray(jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))(params, *inputs))


def assert_near(actual, expected, tolerance):
    assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def without_variance(flat, args):
    """The published arrays with the first C channels of the head."""
    p, c, end = args["patch_size"], args["in_channels"], {}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        head = flat[name].reshape(p, p, 2 * c, -1)[:, :, :c]
        end[name] = head.reshape(p * p * c, *flat[name].shape[1:])
    return flat | end


def test_sits_network_is_dits_at_times_that_are_no_integers(flow, network):
    args, _, params, flat = network("a")
    z = flow("sit_net.npz")
    assert json.loads(str(z["geometry"])) == args
    x, t, y, channels = nhwc(z["x"]), z["t"], z["y"], args["in_channels"]
    out = apply(args, params, x, t, y)
    assert_near(out, nhwc(z["dit_out"]), 1e-5)
    assert_near(out[..., :channels], nhwc(z["out"]), 1e-5)
    small = without_variance(flat, args)
    inferred = published.infer_args(small, args["num_heads"])
    assert not inferred["learn_sigma"] and published.infer_args(flat, args["num_heads"])["learn_sigma"]
    out = apply(inferred, published.from_published(small, inferred), x, t, y)
    assert out.shape == x.shape
    assert_near(out, nhwc(z["out"]), 1e-5)


def test_times_are_embedded_as_they_are(flow):
    z = flow("sit_net.npz")
    frequencies = dit.timestep_frequencies(z["t"], z["t_embedding"].shape[1])
    assert_allclose(frequencies, z["t_embedding"], atol=1e-6)


def test_the_arrays_of_sits_files(flow):
    models = json.loads(str(flow("sit_net.npz")["state_dict_shapes"]))
    for name, shapes in models.items():
        model, _, option = name.partition(":")
        shapes = {key: tuple(shape) for key, shape in (models[model] | shapes).items()}
        args = published.infer_args({key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()})
        assert dit.model_args(model.replace("SiT", "DiT")).items() <= args.items()
        assert args["learn_sigma"] == (option != "learn_sigma=False") and not args["second_time"]
        ours = published.published_shapes(args)
        assert ours == shapes and list(ours) == list(shapes)


def test_meanflows_network(flow, network):
    flat, z = network("a")[3], flow("meanflow_net.npz")
    geometry = json.loads(str(z["geometry"]))
    flat = flat | {key.removeprefix("weight:"): z[key] for key in z if key.startswith("weight:")}
    args = published.infer_args(flat, geometry["num_heads"])
    assert geometry.items() <= args.items() and args["second_time"] and not args["learn_sigma"]
    params = published.from_published(flat, args)
    u = apply(args, params, nhwc(z["x"]), z["t"], z["y"], z["t"] - z["r"])
    assert_near(u, nhwc(z["u"]), 1e-5)
    back = published.to_published(params, args)
    assert back.keys() == flat.keys()
    for name, a in flat.items():
        assert_array_equal(back[name].view(np.uint32), a.view(np.uint32), err_msg=name)
