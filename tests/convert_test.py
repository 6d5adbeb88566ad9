import argparse
import hashlib

import jax
import numpy as np
import pytest
from conftest import GOLDEN, one_error
from numpy.testing import assert_array_equal

from dit_jax.runtime.errors import UserError
from dit_jax.weights import files as weight_files, published


@pytest.mark.parametrize("which", ["a", "b"])
def test_round_trip_is_exact(network, which):
    args, _, params, flat = network(which)
    back = published.to_published(params, args)
    assert list(back) == list(flat)
    for name in flat:
        assert back[name].dtype == np.float32
        assert_array_equal(back[name].view(np.uint32), flat[name].view(np.uint32), err_msg=name)
    inferred = published.infer_args(flat, num_heads=args["num_heads"])
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
    torch.save(
        {
            "model": {k: v + 1 for k, v in tensors.items()},
            "ema": tensors,
            "opt": {"state": {}},
            "args": argparse.Namespace(model="DiT-XL/2"),
        },
        path,
    )
    assert_array_equal(weight_files.read(str(path))["pos_embed"], flat["pos_embed"])
    assert_array_equal(weight_files.read(str(path), "raw")["pos_embed"], flat["pos_embed"] + 1)


def test_pt_files_are_read_as_torch_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "a": whole,
        "part": whole[1:3, ::2],
        "turned": whole.T,
        "half": whole.half() / 3,
        "none": torch.zeros(0, 3),
        "bfloat16": (whole / 7).bfloat16(),
        "scalar": whole[3, 5],
        "parameter": torch.nn.Parameter(whole.double()),
    }
    torch.save(tensors, tmp_path / "a.pt")
    there = weight_files.read(str(tmp_path / "a.pt"))
    assert list(there) == list(tensors)
    for name, tensor in tensors.items():
        assert there[name].dtype == np.float32
        assert_array_equal(there[name], tensor.detach().float().numpy(), err_msg=name)


class Malice:
    def __reduce__(self):
        return print, ("run",)


def test_a_pt_file_runs_nothing(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"a": Malice()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt: cannot be read as weights .*print"):
        weight_files.read(str(tmp_path / "a.pt"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_a_changed_byte_is_noticed(kind, network, tmp_path):
    if kind == "pt":
        pytest.importorskip("torch")
    args, _, _, flat = network("b")
    path = tmp_path / f"a.{kind}"
    weight_files.write(str(path), dict(flat))
    data, wanted = bytearray(path.read_bytes()), flat["blocks.1.mlp.fc1.weight"].tobytes()
    data[data.index(wanted) + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"a.{kind}: blocks.1.mlp.fc1.weight: cannot be read"):
        published.from_published(weight_files.read(str(path)), args)


def test_weights_are_not_copied_on_the_way_to_the_cpu(network):
    """Twice the weights would not fit where they do."""
    args, _, _, flat = network("b")
    for leaf in jax.tree.leaves(published.from_published(flat, args)):
        assert jax.device_put(leaf, jax.devices()[0]).unsafe_buffer_pointer() == leaf.ctypes.data


def test_the_digest_on_the_way_is_that_of_all_arrays(network):
    args, _, _, flat = network("b")
    sha256 = hashlib.sha256()
    published.from_published(flat, args, sha256)
    assert sha256.hexdigest() == hashlib.sha256(b"".join(a.tobytes() for a in flat.values())).hexdigest()


def test_wrong_weights_name_the_array(network, tmp_path):
    args, _, _, flat = network("b")
    name = "blocks.1.mlp.fc1.weight"
    with pytest.raises(UserError, match=f"{name} is missing"):
        published.from_published({k: v for k, v in flat.items() if k != name}, args)
    with pytest.raises(UserError, match=name + r" has shape \(1, 2\)"):
        published.from_published({**flat, name: np.zeros((1, 2))}, args)
    with pytest.raises(UserError, match="unknown array extra"):
        published.from_published({**flat, "extra": np.zeros(1)}, args)
    with pytest.raises(UserError, match="x_embedder"):
        published.infer_args({"a": np.zeros(1)})


@pytest.mark.parametrize(
    "name, content",
    [
        ("cut.npz", b"PK\x03\x04 cut short"),
        ("cut.pt", b"PK\x03\x04 cut short"),
        ("text.npz", b"hello"),
        ("empty.pt", b""),
    ],
)
def test_unreadable_weights_get_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as e:
        weight_files.read(str(tmp_path / name))
    assert "\n" not in str(e.value)


def test_files_of_something_else_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    flat = {"pos_embed": np.zeros(3, np.complex64)}
    for name, content in (("list.pt", [1]), ("numbers.pt", {"a": 1}), ("half.pt", {"model": {}, "ema": None})):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: holds no state dict"):
            weight_files.read(str(tmp_path / name))
    np.savez(tmp_path / "complex.npz", **flat)
    with pytest.raises(UserError, match="pos_embed is complex64"):
        weight_files.read(str(tmp_path / "complex.npz"))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(UserError, match="array.npz: cannot be read"):
        weight_files.read(str(tmp_path / "array.npz"))


@pytest.mark.parametrize(
    "change, heads, words",
    [
        ({}, 5, "--num_heads=5 does not divide"),
        ({}, None, "width 32 is none of the paper's"),
        ({"pos_embed": np.zeros(4)}, 2, "another shape"),
        ({"y_embedder.embedding_table.weight": np.zeros((0, 32))}, 2, "0 rows of labels"),
    ],
)
def test_odd_geometry_is_refused(network, change, heads, words):
    with pytest.raises(UserError, match=words):
        published.infer_args({**network("b")[3], **change}, num_heads=heads)


def test_missing_weights(command, tmp_path):
    one_error(command("convert", f"--weights={tmp_path}/none.pt", f"--out={tmp_path}/x.npz"), "none.pt: no such file")
    one_error(command("convert", f"--weights={tmp_path}/none.pt", f"--out={tmp_path}/no/x.npz"), "no such folder")
