"""Files that lie: whatever is in them, a reader takes them or raises one line that names them, soon and in little memory.

DIT_JAX_FAULTS=10 draws ten times as many cases.
"""

import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
import types
import zipfile
import zlib

import jax
import numpy as np
import pytest
from conftest import GOLDEN, save_vae, tar, write_cache
from PIL import Image

from dit_jax.data import decode as decode_, imagenet, latents, records, sources
from dit_jax.evaluation import features, references, samples
from dit_jax.training.metrics import read_records
from dit_jax.vae import files as vae_files
from dit_jax.weights import files as weight_files, published

pytestmark = pytest.mark.slow

CASES = 200 * int(os.environ.get("DIT_JAX_FAULTS", "1"))
SECONDS, GROWTH = 8, 500 * 2**20
FEATURES = types.SimpleNamespace(name="FID", sha256="0" * 64, widths=(6, None))
NETWORK = {"fc": {"kernel": jax.ShapeDtypeStruct((4, 6), np.float32), "bias": jax.ShapeDtypeStruct((6,), np.float32)}}


# ------------------------------------------------------------------------------------------ good files, and their readers


def zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def unzipped(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npz(**arrays):
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def picture(kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).save(out, kind)
    return out.getvalue()


def read_dit(folder, name):
    flat = weight_files.read(f"{folder}/{name}")
    return published.from_published(flat, published.infer_args(flat, num_heads=2))


def read_cache(folder):
    cache = latents.LatentCache(folder)
    indices = np.arange(min(len(cache), 20))
    problems = [
        p
        for i in range(len(cache.manifest["shards"]))
        if (p := latents.check_shard(folder, cache.manifest, i, latents.sizes(folder)))
    ]
    assert all(len(p.splitlines()) == 1 for p in problems)
    return cache.examples(indices, indices % 2 == 0)


def read_arrays(folder):
    source = sources.arrays(folder)
    return source.examples(np.arange(min(2, len(source))), np.array([False, True])[: len(source)])


def decode_all(folder):
    for name in sorted(os.listdir(folder)):
        try:
            decode_.decode(decode_.read_file(f"{folder}/{name}"))
        except decode_.BadImage as e:
            raise ValueError(f"{folder}/{name}: {e}") from None


def network_as_small(read):
    def run(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features.inception, "abstract", lambda **_: (None, NETWORK))
            return read(folder)

    return run


def drawn(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{kind: ({file name: bytes}, reader of a folder with them)}"""
    torch = pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("good")
    save_vae(root / "vae", 0, (8, 8))
    vae = {p.name: p.read_bytes() for p in (root / "vae").iterdir()}
    flat = weight_files.read_all(str(root / "vae" / vae_files.WEIGHTS))
    (root / "bin").mkdir()
    torch.save({"state_dict": {name: torch.tensor(a) for name, a in flat.items()}}, root / "bin" / "vae.bin")
    write_cache(str(root / "cache"), 6)
    cache = {p.name: p.read_bytes() for p in (root / "cache").iterdir()}
    fc = {"fc.weight": drawn(6, 4), "fc.bias": drawn(6)}
    for name, new in (("old.pth", False), ("new.pth", True)):
        torch.save({name: torch.tensor(a) for name, a in fc.items()}, root / name, _use_new_zipfile_serialization=new)
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 256, (5, 6, 6, 3), np.uint8)
    synsets = ("n01440764", "n01531178")
    ilsvrc = {
        imagenet.TARS["train"]: tar(
            {f"{c}.tar": tar({f"{c}_{i}.JPEG": picture("JPEG") for i in range(3)}) for c in synsets}
        ),
        imagenet.TARS["validation"]: tar({f"ILSVRC2012_val_{i:08d}.JPEG": picture("JPEG") for i in (1, 3)}),
    }
    records = [{"step": i, "loss": 1 / i, "mse": 0.1, "vb": 1e-3} for i in range(1, 9)]
    reference = npz(
        mu=drawn(6, dtype=np.float64),
        sigma=np.eye(6),
        manifest=json.dumps({"features": "FID", "features_sha256": "0" * 64, "size": 6}),
        arr_0=shown,
    )
    with np.load(GOLDEN / "dit" / "dit_a_weights.npz") as arrays:
        dit = npz(**arrays)
    network = network_as_small(lambda folder: features.load_inception(f"{folder}/{os.listdir(folder)[0]}"))
    measured = lambda folder: list(samples.load(f"{folder}/s.npz").batches(2))
    return {
        "dit.pt": ({"w.pt": (GOLDEN / "dit" / "dit_b.pt").read_bytes()}, lambda folder: read_dit(folder, "w.pt")),
        "dit.npz": ({"w.npz": dit}, lambda folder: read_dit(folder, "w.npz")),
        "vae": (vae, vae_files.load),
        "vae.bin": (
            {"vae.bin": (root / "bin" / "vae.bin").read_bytes(), "config.json": vae["config.json"]},
            lambda folder: vae_files.load(f"{folder}/vae.bin"),
        ),
        "network.old": ({"w.pth": (root / "old.pth").read_bytes()}, network),
        "network.new": ({"w.pth": (root / "new.pth").read_bytes()}, network),
        "network.npz": ({"w.npz": npz(**fc)}, network),
        "reference": ({"ref.npz": reference}, lambda folder: references.load_reference(f"{folder}/ref.npz", FEATURES)),
        "samples": ({"s.npz": npz(arr_0=shown)}, measured),
        "pngs": ({f"{i}.png": picture() for i in range(3)}, lambda folder: list(samples.load(folder).batches(2))),
        "arrays": ({"images.npy": npy(shown), "labels.npy": npy(np.arange(5))}, read_arrays),
        "cache": (cache, read_cache),
        "pictures": ({f"p.{kind}": picture(kind) for kind in decode_.FORMATS}, decode_all),
        "imagenet": (ilsvrc, lambda folder: imagenet.contents(folder, partial=True)),
        "records": (
            {"metrics.jsonl": "".join(json.dumps(r) + "\n" for r in records).encode()},
            lambda folder: read_records(f"{folder}/metrics.jsonl"),
        ),
    }


class TooLong(BaseException):
    """No Exception: the readers turn those into their own."""


def check(reader, folder):
    """Reads; -> the error's text, or None."""

    def stop(*_):
        raise TooLong

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(4 * SECONDS)
    try:
        reader(str(folder))
        said = None
    except ValueError as e:
        said = str(e)
        assert len(said.splitlines()) == 1 and said.isprintable() and len(said) < 1000, said
        assert str(folder) in said, said
    finally:
        signal.alarm(0)
    assert time.perf_counter() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH
    return said


def write(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for name, data in files.items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(data)


# -------------------------------------------------------------------------------------------------------- drawn damage

NUMBERS = [
    b"0",
    b"-1",
    b"1",
    b"3",
    b"7",
    b"200000",
    b"300000000",
    b"2147483648",
    b"9223372036854775807",
    b"1e999",
    b"NaN",
    b"9" * 30,
    b"9" * 5000,
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'"x"',
    b"[" * 3000,
    b"0.5",
    b"-0",
    b'"\\ud800\\n"',
]
CODES = [
    b"b",
    b"a",
    b"e",
    b"s",
    b"u",
    b"R",
    b"\x81",
    b"Q",
    b"(",
    b"t",
    b"0",
    b"1",
    b"2",
    b"]",
    b"}",
    b")",
    b"N",
    b".",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x96\x00\x00\x00\x00\x08\x00\x00\x00",
    b"r\x00\x00\x00\x80",
    b"j\x00\x00\x00\x80",
    b"J\x00\x0d\x03\x00",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"K\x00",
    b"K\x07",
    b"\x85",
    b"\x86",
    b"\x87",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"X\x02\x00\x00\x00a\n",
    b"cbuiltins\neval\n",
    b"ctorch\nFloatStorage\n",
    b"carray\narray\n",
    b"\x8f",
    b"\x90",
    b"\x91",
    b"i",
    b"o",
    b"\x92",
]


def mutate(rng, data):
    """Damaged bytes."""

    def place():
        return int(rng.integers(len(data) + 1)) if rng.random() < 0.5 else int(rng.integers(min(len(data), 400) + 1))

    a, b = sorted((place(), place()))
    b = min(b, a + int(rng.integers(1, 64)))
    kind = rng.integers(9)
    if kind == 0:
        flipped = bytearray(data)
        for _ in range(int(rng.integers(1, 9))):
            if flipped:
                flipped[place() % len(flipped)] ^= 1 << int(rng.integers(8))
        return bytes(flipped)
    if kind == 1:
        return data[:a] + rng.bytes(b - a) + data[b:]
    if kind == 2:
        return data[:a]
    if kind == 3:
        return data + (rng.bytes(int(rng.integers(1, 2000))) if rng.random() < 0.5 else bytes(1024))
    if kind == 4:
        return data[:b] + data[a:b] * int(rng.integers(1, 50)) + data[b:]
    if kind == 5:
        c = place()
        return data[:a] + data[c : c + b - a] + data[b:]
    if kind == 6:
        code = CODES[rng.integers(len(CODES))]
        return data[:a] + code + data[a + (len(code) if rng.random() < 0.5 else 0) :]
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?|null|true|false|\"\w+\"", data))
    if not numbers:
        return data[:a] + data[b:]
    at = numbers[rng.integers(len(numbers))]
    return data[: at.start()] + NUMBERS[rng.integers(len(NUMBERS))] + data[at.end() :]


def lie(rng, name, data):
    """The same, a layer further in where there is one, its checksums and lengths made right."""
    if data[:2] == b"PK" and rng.random() < 0.8:
        members = unzipped(data)
        names = list(members)
        first = [n for n in names if n.endswith("data.pkl")]
        chosen = first[0] if first and rng.random() < 0.8 else names[rng.integers(len(names))]
        if rng.random() < 0.1:
            members[chosen + "x"] = members.pop(chosen)
        elif rng.random() < 0.1:
            del members[chosen]
        else:
            members[chosen] = mutate(rng, members[chosen])
        return zipped(members)
    if name.endswith(".safetensors") and rng.random() < 0.8:
        end = 8 + int.from_bytes(data[:8], "little")
        header = mutate(rng, data[8:end])
        return len(header).to_bytes(8, "little") + header + data[end:]
    if name == latents.MANIFEST and rng.random() < 0.8:
        try:
            fields = json.loads(mutate(rng, data))
            return latents.to_bytes(latents.seal({k: v for k, v in fields.items() if k != "sha256"}))
        except (ValueError, RecursionError, AttributeError):
            return data[:-9]
    if name.endswith(".tar") and rng.random() < 0.8:
        headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
        at = headers[rng.integers(len(headers))]
        field = [(0, 100), (124, 136), (156, 157), (345, 500), (386, 500)][rng.integers(5)]
        header = bytearray(data[at : at + 512])
        header[slice(*field)] = [b"\x80", b"\xff", b"7", b"S", b"x", b"L", b"0", bytes([rng.integers(256)])][
            rng.integers(8)
        ] * (field[1] - field[0])
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return data[:at] + bytes(header) + data[at + 512 :]
    if name.endswith(("png", "PNG")) and rng.random() < 0.7:
        at = data.index(b"IHDR")
        chunk = data[at : at + 4] + mutate(rng, data[at + 4 : at + 17])[:13].ljust(13, b"\0")
        return data[:at] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at + 21 :]
    return mutate(rng, data)


KINDS = (
    "dit.pt",
    "dit.npz",
    "vae",
    "vae.bin",
    "network.old",
    "network.new",
    "network.npz",
    "reference",
    "samples",
    "pngs",
    "arrays",
    "cache",
    "pictures",
    "imagenet",
    "records",
)


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_are_read(kind, good, tmp_path):
    files, reader = good[kind]
    write(tmp_path / "f", files)
    assert check(reader, tmp_path / "f") is None


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_lies(kind, good, tmp_path):
    files, reader = good[kind]
    for case in range(-(-CASES // len(KINDS))):
        rng = np.random.default_rng([case, *kind.encode()])
        name = sorted(files)[rng.integers(len(files))]
        write(tmp_path / "f", files | {name: lie(rng, name, files[name])})
        try:
            check(reader, tmp_path / "f")
        except BaseException as e:
            e.add_note(f"{kind}: case {case}, {name}")
            raise


# ------------------------------------------------------------------------------------------------------- named lies


def pickled(data):
    """A .pt whose pickle is this, with one storage of 4 floats."""
    return zipped({"a/data.pkl": data, "a/data/0": bytes(16), "a/byteorder": b"little"})


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def number(n):
    return b"\x8a" + bytes([len(e := n.to_bytes(10, "little", signed=True))]) + e


def tensors(arrays, offset=b"K\x00"):
    """A .pt of {name: (shape, strides)}, each of the same 4 floats."""
    out = b"\x80\x02}("
    for name, (shape, strides) in arrays.items():
        out += (
            b"X"
            + struct.pack("<I", len(name))
            + name.encode()
            + b"ctorch._utils\n_rebuild_tensor_v2\n("
            + STORAGE
            + offset
        )
        for numbers in (shape, strides):
            out += b"(" + b"".join(map(number, numbers)) + b"t"
        out += b"\x89}tR"
    return pickled(out + b"u.")


BASE = {
    "x_embedder.proj.weight": ((1, 1, 1, 1),) * 2,
    "pos_embed": ((1, 1, 1),) * 2,
    "y_embedder.embedding_table.weight": ((1, 1),) * 2,
}
DAG = (
    b")" + b"\x86".join([b"2"] * 90) + b"\x86"
)  # a tuple of the same tuple twice, and so on: no end to hash or show it
PICKLES = {
    "BUILD on a string": b"\x80\x02X\x01\x00\x00\x00a}b.",
    "append to an int": b"\x80\x02K\x01K\x02a.",
    "a huge BINBYTES8": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "a huge BYTEARRAY8": b"\x80\x05\x96" + b"\0" * 4 + b"\2\0\0\0.",
    "a memo of 2**31": b"\x80\x02}r\x00\x00\x00\x80.",
    "names that are integers": b"\x80\x02}K\x01K\x02s.",
    "a class's state": b"\x80\x02cargparse\nNamespace\nN}X\x08\x00\x00\x00__init__K\x01s\x86b.",
    "a key without end": b"\x80\x02}" + DAG + b"K\x01s.",
    "a value without end": b"\x80\x02}X\x01\x00\x00\x00a" + DAG + b"s.",
    "a storage without end": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + DAG + b"K\x01tQ.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "nothing": b"",
    "a long name": b"\x80\x02}X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"K\x01s.",
    "an odd dict": b"\x80\x02}(K\x01u.",
    "deep": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
}
LIES = {f"pickle: {name}": ("dit.pt", {"w.pt": pickled(data)}) for name, data in PICKLES.items()} | {
    f"tensor: {name}": ("dit.pt", {"w.pt": tensors(BASE | arrays, *rest)})
    for name, (arrays, *rest) in {
        "200,000 channels of one number": ({"x_embedder.proj.weight": ((200_000, 4, 2, 2), (0, 0, 0, 0))},),
        "3e8 classes of one number": ({"y_embedder.embedding_table.weight": ((300_000_000, 1152), (0, 0))},),
        "a negative size": ({"pos_embed": ((1, -1, 1), (1, 1, 1))},),
        "a negative stride": ({"pos_embed": ((1, 4, 1), (1, -1, 1))},),
        "beyond its storage": ({"pos_embed": ((1, 4, 1), (1, 2, 1))},),
        "2**70": ({"pos_embed": ((1, 2**70, 0), (1, 2**70, 1))},),
        "a far offset": ({}, number(2**40)),
        "an offset below": ({}, number(-1)),
        "no offset": ({}, b"N"),
        "a billion blocks": ({"blocks.999999999.attn.qkv.weight": ((1, 1), (1, 1))},),
        "a block with a long number": ({f"blocks.{'9' * 150}.attn.qkv.weight": ((1, 1), (1, 1))},),
        "no width": ({"x_embedder.proj.weight": ((0, 1, 1, 1), (1, 1, 1, 1))},),
        "no patch": ({"x_embedder.proj.weight": ((2, 1, 0, 0), (1, 1, 1, 1))},),
        "five tokens": ({"x_embedder.proj.weight": ((2, 2, 1, 1), (1, 1, 1, 1)), "pos_embed": ((1, 3, 1), (1, 1, 1))},),
        "a name of two lines": ({"a\nb": ((1,), (1,))},),
    }.items()
}


def npz_of(header, data=b"\0" * 16, name="arr_0"):
    header = header.ljust(118).encode() + b"\n"
    return zipped({f"{name}.npy": b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data})


def deflated(data, cut=0, declared=None):
    """A zip with a deflated arr_0.npy, so many of its bytes changed, or another size declared."""
    packed = zlib.compress(data, wbits=-15)
    packed = packed[:20] + bytes([packed[20] ^ 0xFF] * cut) + packed[20 + cut :]
    sizes = struct.pack("<III", zlib.crc32(data), len(packed), len(data) if declared is None else declared)
    local = b"PK\3\4" + struct.pack("<HHHHH", 20, 0, 8, 0, 0) + sizes + struct.pack("<HH", 9, 0) + b"arr_0.npy" + packed
    central = (
        b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0) + sizes + struct.pack("<HHHHHII", 9, 0, 0, 0, 0, 0, 0)
    )
    central += b"arr_0.npy"
    return local + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


HEADERS = {
    "unbalanced": "{'descr': '|u1', 'fortran_order': False, 'shape': ((((5, 6, 6, 3), }",
    "a list": "[1, 2]",
    "negative": "{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 6, 6, -3), }",
    "huge": "{'descr': '|u1', 'fortran_order': False, 'shape': (5000000000000, 256, 256, 3), }",
    "without an end": "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 0, 0, 3), }",
    "true": "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 1, 5, 3), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (2, 1, 1, 1), }",
    "structures": "{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (2,), }",
    "big endian": "{'descr': '>u2', 'fortran_order': False, 'shape': (1, 1, 2, 3), }",
    "an endless type": "{'descr': '|V9999999999', 'fortran_order': False, 'shape': (1,), }",
    "nested": "{'descr': " + "(" * 90,
}
LIES |= {
    f"header: {name} in {kind}": (kind, {file: npz_of(text)})
    for name, text in HEADERS.items()
    for kind, file in (("samples", "s.npz"), ("reference", "ref.npz"), ("dit.npz", "w.npz"), ("network.npz", "w.npz"))
}
LIES |= {
    f"header: {name} in arrays": ("arrays", {"images.npy": unzipped(npz_of(text))["arr_0.npy"]})
    for name, text in HEADERS.items()
}
BOMB = (
    np.lib.format.magic(1, 0)
    + unzipped(npz_of("{'descr': '|u1', 'fortran_order': False, 'shape': (20000, 80, 80, 3), }", b""))["arr_0.npy"][8:]
    + bytes(384_000_000)
)


def manifest(**changes):
    def change(files):
        fields = json.loads(files["manifest.json"])
        del fields["sha256"]
        for name, value in changes.items():
            if value is KeyError:
                del fields[name]
            elif name.startswith("vae_"):
                fields["vae"][name[4:]] = value
            elif name.startswith("shard_"):
                fields["shards"][0][name[6:]] = value
            else:
                fields[name] = value
        return {"manifest.json": latents.to_bytes(latents.seal(fields))}

    return change


LIES |= {
    f"manifest: {name}={str(value)[:20]}": ("cache", manifest(**{name: value}))
    for name, value in (
        ("count", 7),
        ("count", "6"),
        ("count", True),
        ("shape", [8, 8]),
        ("shape", [8, 8, 10**9]),
        ("shape", [8, 8, -4]),
        ("shape", [8, 8, 4.0]),
        ("shape", 3),
        ("dtype", "object"),
        ("dtype", []),
        ("shards", {}),
        ("shards", []),
        ("shards", None),
        ("shards", [None]),
        ("shard_count", -3),
        ("shard_count", 10**12),
        ("shard_file", "../x"),
        ("shard_file", 5),
        ("shard_bytes", "9"),
        ("vae", []),
        ("vae_scale", float("nan")),
        ("vae_scale", "1"),
        ("vae_scale", 10**400),
        ("vae_encoder", 3),
        ("vae_name", "a\nb"),
        ("class_names", [1]),
        ("class_names", "ab"),
        ("num_classes", -1),
        ("size", None),
        ("format", KeyError),
        ("format", [3] * 1000),
        ("vae", KeyError),
        ("shape", KeyError),
        ("class_names", KeyError),
        ("skipped", [{}]),
        ("skipped", 5),
    )
}
DEEP = b"[" * 100_000
LIES |= {
    f"config: {str(text)[:40]}": ("vae", {"config.json": text})
    for text in (
        DEEP,
        b"[]",
        b"5",
        b'{"scaling_factor": NaN}',
        b'{"scaling_factor": true}',
        b'{"scaling_factor": 1' + b"0" * 400 + b"}",
        b'{"scaling_factor": [1]}',
        b'{"layers_per_block": 1000000000}',
        b'{"layers_per_block": true}',
        b'{"latent_channels": "4"}',
        b'{"block_out_channels": 8}',
        b'{"block_out_channels": []}',
        b'{"block_out_channels": [200000, 200000]}',
        b'{"block_out_channels": [8, [8]]}',
        b'{"norm_num_groups": 0}',
        b'{"norm_num_groups": -4}',
        b'{"in_channels": 1e3}',
        b'{"in_channels": null}',
        b'{"act_fn": "a\\nb"}',
        b'{"latent_channels": ' + b"9" * 5000 + b"}",
        b"\xff\xfe\0",
    )
}
LIES |= {
    "/etc/passwd": ("vae.bin", {"vae.bin": b"root:x:0:0:root:/root:/bin/bash\n" * 20}),
    "a damaged stream": (
        "samples",
        {"s.npz": deflated(npy(np.arange(9 * 48 * 48 * 3).astype(np.uint8).reshape(9, 48, 48, 3)), 9)},
    ),
    "a bomb": ("samples", {"s.npz": deflated(BOMB)}),
    "a bomb in a reference": ("reference", {"ref.npz": deflated(BOMB)}),
    "a bomb that declares little": ("network.npz", {"w.npz": deflated(BOMB, declared=600)}),
    "a bomb of weights": ("dit.npz", {"w.npz": deflated(BOMB)}),
    "a bomb of a pickle": ("dit.pt", {"w.pt": pickled(b"}" * 2**23)}),
    "a member that is no array": ("dit.npz", {"w.npz": zipped({"a.npy": b"hello", "b.txt": b""})}),
    "a reference that is an array": ("reference", {"ref.npz": npy(drawn(6))}),
    "a manifest that is a number": (
        "reference",
        {
            "ref.npz": npz(
                mu=drawn(6), sigma=np.eye(6), manifest=np.array(json.dumps({"features": 5, "features_sha256": []}))
            )
        },
    ),
    "text for numbers": ("reference", {"ref.npz": npz(mu=np.array(["a"] * 6), sigma=np.eye(6))}),
    "numbers out of range": ("reference", {"ref.npz": npz(mu=np.full(6, 1e300), sigma=np.eye(6))}),
    "safetensors of a huge header": ("vae", {vae_files.WEIGHTS: b"\xff" * 7 + b"\x7f" + b"{}"}),
    "safetensors of a huge shape": (
        "vae",
        {
            vae_files.WEIGHTS: struct.pack("<Q", 80)
            + (b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}').ljust(80)
        },
    ),
    "arrays in a zip": ("arrays", {"images.npy": npz(a=drawn(2))}),
    "a pickle for arrays": ("arrays", {"labels.npy": pickle.dumps([1])}),
    "a png that declares much": (
        "pngs",
        {
            "0.png": picture()[:16]
            + (head := struct.pack(">II", 10**9, 10**9) + b"\x08\x02\0\0\0")
            + struct.pack(">I", zlib.crc32(b"IHDR" + head))
            + picture()[33:]
        },
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_named_lies(case, good, tmp_path):
    kind, changed = LIES[case]
    files, reader = good[kind]
    write(tmp_path / "f", files | (changed(files) if callable(changed) else changed))
    assert check(reader, tmp_path / "f")


def header(name, size, kind=b"0"):
    h = bytearray(512)
    h[: len(name)], h[124:136], h[156:157], h[257:265] = name, size, kind, b"ustar  \0"
    h[148:156] = b" " * 8
    h[148:156] = b"%06o\0 " % sum(h)
    return bytes(h)


@pytest.mark.parametrize(
    "size, kind",
    [
        (b"\xff" * 11 + b"\0", b"0"),
        (b"\x80" + b"\0" * 6 + b"\x7f" + b"\0" * 4, b"0"),
        (b"77777777777\0", b"0"),
        (b"77777777777\0", b"L"),
        (b"\x80" + b"\xff" * 11, b"x"),
        (b"00000001000\0", b"S"),
        (b"00000000000\0", b"2"),
    ],
)
def test_tar_members_that_lie(size, kind, good, tmp_path):
    train = header(b"n01440764.tar", size, kind) + bytes(2048)
    write(tmp_path / "f", {imagenet.TARS["train"]: train})
    assert check(good["imagenet"][1], tmp_path / "f")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pictures"])
@pytest.mark.parametrize("what", ["pipe", "zeros", "folder", "a terabyte"])
def test_what_is_no_file_or_an_endless_one(what, kind, good, tmp_path):
    files, reader = good[kind]
    for name in files:
        write(tmp_path / "f", files)
        path = tmp_path / "f" / name
        path.unlink()
        if what == "pipe":
            os.mkfifo(path)
        elif what == "zeros":
            path.symlink_to("/dev/zero")
        elif what == "folder":
            path.mkdir()
        else:
            with open(path, "wb") as f:
                f.truncate(2**40)
        said = check(reader, tmp_path / "f")
        # What is left out is no error: other pictures are there, the checksums tell of shards, records end where they break.
        assert said or kind in ("imagenet", "pngs", "cache", "records") or what == "folder", name


def test_records_that_are_none_are_left_out(tmp_path):
    good = b'{"step": 1, "loss": 0.5, "mse": 0.4, "vb": NaN}\n'
    for line in (
        DEEP,
        b"[]",
        b'{"step": "1"}',
        b'{"step": true}',
        b'{"step": 1.0}',
        b'{"loss": 1.0}',
        b'{"step": 2, "fid": [1]}',
        b'{"step": 2, "fid": null}',
        b'{"step": 2, "fid": "1"}',
        b'{"step": 2, "fid": true}',
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": 2, "x": ' + b"9" * 400 + b"}",
        b"\xff\xff",
        b"{",
    ):
        (tmp_path / "m.jsonl").write_bytes(good + line + b"\n" + good)
        assert {r["step"] for r in read_records(str(tmp_path / "m.jsonl"))} == {1}, line[:40]


def test_folders_in_folders_without_end(tmp_path):
    (tmp_path / "data").mkdir()
    here = os.open(tmp_path / "data", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("a", dir_fd=here)
        here, above = os.open("a", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    try:
        assert check(records.Folder, tmp_path / "data")
    finally:
        os.close(here)
        subprocess.run(["rm", "-rf", tmp_path / "data"], check=True)  # too deep for pytest's own


def test_half_precision_and_what_is_shared_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    a = torch.arange(6.0).reshape(2, 3)
    for new in (True, False):
        torch.save(
            {"a": a.half(), "b": a.bfloat16(), "n": torch.tensor(3), "p": torch.nn.Parameter(a.T)},
            tmp_path / "w.pth",
            _use_new_zipfile_serialization=new,
        )
        there = weight_files.read_all(str(tmp_path / "w.pth"))
        assert [str(there[name].dtype) for name in "abnp"] == ["float32", "float32", "int64", "float32"]
        assert there["n"] == 3 and np.array_equal(there["p"], a.T.numpy()) and np.array_equal(there["b"], a.numpy())
    assert hashlib.sha256(there["a"]).digest() == hashlib.sha256(a.numpy()).digest()


def test_arrays_that_share_a_storage(tmp_path):
    """The whole storage is unpacked for each."""
    import torch

    storage = torch.zeros(2**21)
    torch.save({f"x{i}": storage[i : i + 1] for i in range(100)}, tmp_path / "shared.pt")
    for read in (weight_files.read, weight_files.read_all):
        with pytest.raises(ValueError, match="shared.pt: .*its arrays take 0.839 GB"):
            read(str(tmp_path / "shared.pt"))
