import argparse

import numpy as np
import pytest
from conftest import GOLDEN, one_error
from numpy.testing import assert_array_equal

from dit_jax import convert
from dit_jax.config import UserError


@pytest.mark.parametrize("which", ["a", "b"])
def test_round_trip_is_exact(network, which):
    args, _, params, flat = network(which)
    back = convert.to_published(params, args)
    assert list(back) == list(flat)
    for name in flat:
        assert back[name].dtype == np.float32
        assert_array_equal(back[name].view(np.uint32), flat[name].view(np.uint32), err_msg=name)
    inferred = convert.infer_args(flat, num_heads=args["num_heads"])
    assert {key: inferred[key] for key in args} == args


def test_pt_to_npz_to_pt(command, tmp_path):
    torch = pytest.importorskip("torch")
    source = GOLDEN / "dit" / "dit_b.pt"
    for a, b in ((source, tmp_path / "b.npz"), (tmp_path / "b.npz", tmp_path / "b.pt")):
        status, out, err = command("convert", f"--weights={a}", f"--out={b}", "--num_heads=2")
        assert status == 0 and "2 blocks of width 32" in out, err
    old, new = (torch.load(path, weights_only=True) for path in (source, tmp_path / "b.pt"))
    assert list(old) == list(new) and all(torch.equal(old[k], new[k]) for k in old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.npz", "b.pt"]


def test_training_checkpoints_of_the_published_code(network, tmp_path):
    torch = pytest.importorskip("torch")
    flat = network("b")[3]
    tensors = {k: torch.from_numpy(v) for k, v in flat.items()}
    path = tmp_path / "0400000.pt"
    torch.save({"model": {k: v + 1 for k, v in tensors.items()}, "ema": tensors, "opt": {"state": {}},
                "args": argparse.Namespace(model="DiT-XL/2")}, path)
    assert_array_equal(convert.read_weights(str(path))["pos_embed"], flat["pos_embed"])
    assert_array_equal(convert.read_weights(str(path), "raw")["pos_embed"], flat["pos_embed"] + 1)


def test_wrong_weights_name_the_array(network, tmp_path):
    args, _, _, flat = network("b")
    name = "blocks.1.mlp.fc1.weight"
    with pytest.raises(UserError, match=f"{name} is missing"):
        convert.from_published({k: v for k, v in flat.items() if k != name}, args)
    with pytest.raises(UserError, match=name + r" has shape \(1, 2\)"):
        convert.from_published({**flat, name: np.zeros((1, 2))}, args)
    with pytest.raises(UserError, match="unknown array extra"):
        convert.from_published({**flat, "extra": np.zeros(1)}, args)
    with pytest.raises(UserError, match="x_embedder"):
        convert.infer_args({"a": np.zeros(1)})


@pytest.mark.parametrize("name, content", [("cut.npz", b"PK\x03\x04 cut short"), ("cut.pt", b"PK\x03\x04 cut short"),
                                           ("text.npz", b"hello"), ("empty.pt", b"")])
def test_unreadable_weights_get_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    if name.endswith(".pt"):
        pytest.importorskip("torch")
    with pytest.raises(UserError, match=name) as e:
        convert.read_weights(str(tmp_path / name))
    assert "\n" not in str(e.value)


def test_files_of_something_else_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    flat = {"pos_embed": np.zeros(3, np.complex64)}
    for name, content in (("list.pt", [1]), ("numbers.pt", {"a": 1}), ("half.pt", {"model": {}, "ema": None})):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: holds no state dict"):
            convert.read_weights(str(tmp_path / name))
    np.savez(tmp_path / "complex.npz", **flat)
    with pytest.raises(UserError, match="pos_embed is complex64"):
        convert.read_weights(str(tmp_path / "complex.npz"))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(UserError, match="array.npz: cannot be read"):
        convert.read_weights(str(tmp_path / "array.npz"))


@pytest.mark.parametrize("change, heads, words", [
    ({}, 5, "--num_heads=5 does not divide"), ({}, None, "width 32 is none of the paper's"),
    ({"pos_embed": np.zeros(4)}, 2, "another shape"),
    ({"y_embedder.embedding_table.weight": np.zeros((0, 32))}, 2, "0 rows of labels"),
])
def test_odd_geometry_is_refused(network, change, heads, words):
    with pytest.raises(UserError, match=words):
        convert.infer_args({**network("b")[3], **change}, num_heads=heads)


def test_missing_weights(command, tmp_path):
    one_error(command("convert", f"--weights={tmp_path}/none.pt", f"--out={tmp_path}/x.npz"), "none.pt: no such file")
    one_error(command("convert", f"--weights={tmp_path}/none.pt", f"--out={tmp_path}/no/x.npz"), "no such folder")
