import contextlib
import errno
import functools
import gc
import os
import platform
import resource
import signal
import socket
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from conftest import save_vae
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from dit_jax import encode
from dit_jax.data import encoder, latents
from dit_jax.data.pictures import Pictures
from dit_jax.data.records import Folder
from dit_jax.runtime import files, hosts
from dit_jax.runtime.errors import UserError
from dit_jax.vae.autoencoder import Autoencoder
from dit_jax.vae.files import load

SHAPE = (4, 4, 3)


def make(folder, x, y, shard_size, dtype="float16"):
    """A cache of posteriors x (N, 2, h, w, 2C) and labels y."""
    shape = [*x.shape[2:4], x.shape[4] // 2]
    folder.mkdir()
    starts = range(0, len(x), shard_size)
    shards = []
    for i, start in enumerate(starts):
        writer = latents.ShardWriter(str(folder), latents.shard_name(i, len(starts)), dtype)
        for row in range(start, min(start + shard_size, len(x)), 5):  # in pieces
            stop = min(row + 5, start + shard_size)
            writer.add(x[row:stop], y[row:stop])
        shards.append(writer.close())
    latents.write_manifest(
        str(folder),
        {
            "format": latents.FORMAT,
            "count": len(x),
            "num_classes": 1000,
            "class_names": None,
            "size": 32,
            "shape": shape,
            "dtype": dtype,
            "vae": {"scale": 0.18215, "encoder": "abc"},
            "shards": shards,
        },
    )
    return str(folder)


@pytest.fixture(scope="module")
def posteriors():
    rng = np.random.default_rng(0)
    mean = 5 * rng.standard_normal((230, 2, *SHAPE))
    x = np.concatenate([mean, np.exp(rng.normal(-5, 2, mean.shape))], -1).astype(np.float32)
    return x, rng.integers(0, 1000, 230).astype(np.int32)


@pytest.mark.parametrize("dtype, rtol", [("float16", 1e-3), ("float32", 0)])
def test_what_was_written_is_read_in_any_order_and_batch(posteriors, tmp_path, dtype, rtol):
    x, y = posteriors
    cache = latents.LatentCache(make(tmp_path / "c", x, y, 100, dtype))
    assert len(cache) == 230 and cache.shape == SHAPE and cache.scale == 0.18215 and cache.can_flip
    assert [entry["count"] for entry in cache.manifest["shards"]] == [100, 100, 30]
    rng = np.random.default_rng(1)
    indices, flips = rng.permutation(np.arange(460) % 230), rng.random(460) < 0.5
    batch = cache.examples(indices.tolist(), flips.tolist())
    assert batch["x"].dtype == dtype and batch["y"].dtype == np.int32
    assert_array_equal(batch["y"], y[indices])
    assert_allclose(batch["x"].astype(np.float32), x[indices, flips.astype(int)], rtol=rtol, atol=1e-7)
    one = [cache.examples([i], [f]) for i, f in zip(indices[:50], flips)]
    assert_array_equal(np.concatenate([b["x"] for b in one]), batch["x"][:50])
    assert cache.examples([], [])["x"].shape == (0, 4, 4, 6)
    with pytest.raises(IndexError, match="230"):
        cache.examples([230], [False])


@pytest.mark.parametrize("shape, count", [((1, 1, 1), 3000), ((32, 32, 4), 40), ((160, 130, 4), 5)])
def test_a_shard_holds_the_records_that_the_format_says(tmp_path, shape, count):
    """From many records in a block of the file to several blocks a record."""
    h, w, channels = shape
    x = np.random.default_rng(0).standard_normal((count, 2, h, w, 2 * channels), np.float32).astype(np.float16)
    y = np.arange(count)
    path = make(tmp_path / "c", x, y, count)
    flips = y % 3 == 0
    batch = latents.LatentCache(path).examples(y, flips)
    assert_array_equal(batch["x"], x[y, flips.astype(int)])
    assert batch["x"].ctypes.data % 64 == 0  # XLA on CPU takes it as it is
    records = ArrayRecordReader(str(tmp_path / "c" / latents.shard_name(0, 1))).read_all()
    for record, posterior, label in zip(records, x.reshape(-1, h, w, 2 * channels), y.repeat(2), strict=True):
        data = posterior.astype("<f2").tobytes() + int(label).to_bytes(4, "little")
        assert record == data + checksum(data).to_bytes(8, "little")


def test_the_bytes_of_a_shard_are_those_of_earlier_versions(tmp_path):
    """The identity of a cache is a hash over them, and a run resumes only on data of the same identity."""
    x = np.arange(3 * 2 * 4 * 4 * 6).reshape(3, 2, 4, 4, 6) % 251 / 8
    writer = latents.ShardWriter(str(tmp_path), latents.shard_name(0, 1), "float16")
    writer.add(x, np.array([1, 2, 3]))
    entry = writer.close()
    assert entry["sha256"] == "387656257503e51594c490152ed7c1295ba6e0f7ed61292dc7c6fb2465edfa18"
    assert entry["bytes"] == (tmp_path / entry["file"]).stat().st_size == 131072


def checksum(data):
    """Of latents and label, word by word in whole numbers."""
    first, of_label, *others = (int(m) | 1 for m in np.random.Philox(key=3).random_raw(1 + len(data) // 4))
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    return (first + sum(m * word for m, word in zip((*others, of_label), words, strict=True))) % 2**64


def test_no_change_of_a_record_goes_unseen():
    x, label = np.random.default_rng(0).integers(0, 256, (1, 64), np.uint8), np.array([7], np.int32)
    before = latents.checksums(x, label)
    changed = [x.copy() for _ in range(64 * 8)]
    for bit, copy in enumerate(changed):
        copy[0, bit // 8] ^= 1 << bit % 8
    pairs = [a ^ b ^ x for a in changed[::5] for b in changed if (a != b).any()]  # two bits of one record
    swapped, cut = x.reshape(1, 16, 4)[:, ::-1].reshape(1, 64), x * (np.arange(64) < 32)
    many = np.concatenate([*changed, *pairs, swapped, cut, x * 0])
    assert (latents.checksums(many, label.repeat(len(many))) != before).all()
    assert all(latents.checksums(x, label ^ (1 << bit)) != before for bit in range(31))
    assert latents.checksums(x * 0, label * 0) != 0  # a record of zeros is none


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_many_threads_read_one_cache(posteriors, tmp_path):
    """Also while its shards are opened. The shards are closed when the cache is dropped."""
    x, y = posteriors
    path = make(tmp_path / "c", x, y, 7)
    before = open_files()
    cache, barrier = latents.LatentCache(path), threading.Barrier(8)
    assert open_files() == before  # a shard is opened when it is first read

    def read(seed):
        rng = np.random.default_rng(seed)
        barrier.wait()
        for _ in range(20):
            indices, flips = rng.integers(0, 230, 32), rng.random(32) < 0.5
            batch = cache.examples(indices, flips)
            assert_array_equal(batch["x"], x[indices, flips.astype(int)].astype(np.float16))
            assert_array_equal(batch["y"], y[indices])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert open_files() == before + 33
    del cache
    gc.collect()
    assert open_files() == before


def removed(shard, _):
    shard.unlink()


def a_folder(shard, _):
    shard.unlink()
    shard.mkdir()


def on_a_disk_that_fails(shard, _):
    shard.unlink()
    shard.symlink_to("/proc/self/mem")  # no byte of it can be read


def no_descriptor_left(shard, after):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    after.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, limits[1]))
    with contextlib.suppress(OSError):
        while True:
            after.callback(os.close, os.dup(0))


@pytest.mark.parametrize(
    "how, reason",
    [
        (removed, "No such file or directory"),
        (a_folder, "Is a directory"),
        (on_a_disk_that_fails, "Input/output error"),
        (no_descriptor_left, "Too many open files"),
    ],
)
def test_a_shard_that_cannot_be_read_is_one_line(posteriors, tmp_path, how, reason):
    cache = latents.LatentCache(make(tmp_path / "c", *posteriors, 100))
    shard = tmp_path / "c" / latents.shard_name(1, 3)
    cache.examples([1, 2], [False, True])
    with contextlib.ExitStack() as after:
        how(shard, after)
        with pytest.raises(UserError, match=rf"^{shard}: cannot be read \({reason}\)$"):
            cache.examples([1, 100, 2, 151], np.zeros(4, bool))
        cache.examples([1, 2], [False, True])  # of a shard that is open already


def test_a_shard_cut_short_while_it_is_open(posteriors, tmp_path):
    x, y = posteriors
    cache = latents.LatentCache(make(tmp_path / "c", x, y, 230))
    everything = np.arange(230)
    cache.examples(everything, everything < 0)
    shard = tmp_path / "c" / latents.shard_name(0, 1)
    os.truncate(shard, shard.read_bytes().index(x[200, 0].astype("<f2").tobytes()) + 3)
    with pytest.raises(UserError, match=f"^{shard}: is damaged: example 200, 201, .*, 229 is not as it was written; "):
        cache.examples(everything, everything < 0)
    assert_array_equal(cache.examples(everything[:200], everything[:200] < 0)["y"], y[:200])
    os.truncate(shard, 0)
    with pytest.raises(UserError, match="is damaged: example 3, 5 is not"):
        cache.examples([3, 5], [True, False])


def test_a_failure_that_passes(posteriors, tmp_path, monkeypatch):
    """A batch that fails is read again, record by record. A shard that is whole is never called damaged."""

    def fails(*_):
        raise RuntimeError("can't start new thread")

    x, y = posteriors
    cache = latents.LatentCache(make(tmp_path / "c", x, y, 100))
    monkeypatch.setattr(type(cache._shards), "__getitems__", fails)
    assert_array_equal(cache.examples([3, 101, 7], [False, True, False])["y"], y[[3, 101, 7]])
    monkeypatch.setattr(type(cache._shards), "__getitem__", fails)
    with pytest.raises(UserError, match="00001-of-00003.array_record: is whole, but example 101 could not be read: "):
        cache.examples([101, 7], [False, False])


def test_the_same_latents_are_the_same_bytes_and_identity(posteriors, tmp_path):
    x, y = posteriors
    a, b, other = (
        latents.LatentCache(make(tmp_path / name, x, labels, 100))
        for name, labels in (("a", y), ("b", y), ("other", y[::-1]))
    )
    assert a.identity == b.identity != other.identity
    for file in latents.sizes(a.path):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def change(file, at=None, bits=1):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= bits
    file.write_bytes(data)


def check(path):
    """{shard: what is wrong}"""
    manifest = latents.read_manifest(path)
    found = [latents.check_shard(path, manifest, i, latents.sizes(path)) for i in range(len(manifest["shards"]))]
    return {i: problem for i, problem in enumerate(found) if problem}


def test_a_flipped_byte_is_found_and_named(posteriors, tmp_path):
    x, y = posteriors
    path = make(tmp_path / "c", x, y, 100)
    assert check(path) == {}
    shard = tmp_path / "c" / latents.shard_name(1, 3)
    record = x[152, 0].astype("<f2").tobytes()
    change(shard, shard.read_bytes().index(record) + 30)
    cache = latents.LatentCache(path)  # sizes are right
    wanted = np.arange(230)
    good = np.setdiff1d(wanted, [152])
    assert_array_equal(cache.examples(good, good < 0)["y"], y[good])
    cache.examples([152], [True])  # its mirror image is whole
    with pytest.raises(ValueError, match=r"latents-00001-of-00003.array_record: is damaged: example 152 is not "):
        cache.examples(wanted, wanted < 0)
    assert check(path) == {1: "is damaged: 1 of its 100 examples are not as they were written: 152"}


def chunk(data, start):
    """The positions of a chunk of Riegeli, whose header of 40 bytes says in its second word how much follows."""
    return range(start, start + 40 + int.from_bytes(data[start + 8 : start + 16], "little"))


def kinds_of_bytes(data, records, i):
    """{kind: positions in the file}, of a shard's records the i-th's among them."""
    start = data.index(records[i])
    end, footer = start + len(records[i]), data.index(records[-1]) + len(records[-1])
    assert list(chunk(data, start - 44)) == list(range(start - 44, end))
    return {
        "header of the file": range(0, 64, 5),
        "header of the chunk": range(start - 44, start - 4),
        "sizes": range(start - 4, start),
        "posterior": range(start, end - 12, 7),
        "label": range(end - 12, end - 8),
        "checksum": range(end - 8, end),
        "index": chunk(data, footer)[::3],
        "where the index is": [*range(len(data) - 65536, len(data) - 65512), *chunk(data, len(data) - 65512)],
        "padding": range(len(data) - 9, len(data)),
    }


def test_no_changed_byte_of_an_example_goes_unseen(posteriors, tmp_path):
    """Either all bytes of an example are read as they were written, or an error names it."""
    path = make(tmp_path / "c", posteriors[0][:4], posteriors[1][:4], 4)
    shard, everything = tmp_path / "c" / latents.shard_name(0, 1), np.arange(4)
    data = shard.read_bytes()
    read = lambda flip: latents.LatentCache(path).examples(everything, everything < flip)["x"].tobytes()
    pictures, mirrored = read(0), read(4)
    for kind, positions in kinds_of_bytes(data, ArrayRecordReader(str(shard)).read_all(), 2 * 2 + 1).items():
        for at in positions:
            change(shard, at, 1 << at % 8)
            if "index" in kind:
                which, found = "0, 1, 2, 3", "none of its examples (0 to 3) can be read"
            else:
                which, found = "2", "1 of its 4 examples are not as they were written: 2"
                assert read(0) == pictures
            if kind in ("header of the file", "padding"):
                found = "its checksum is another, though every example is as it was written"
                assert read(4) == mirrored
            else:
                with pytest.raises(UserError, match=f"^{shard}: is damaged: example {which} is not as it was written"):
                    read(4)
            assert check(path) == {0: f"is damaged: {found}"}, (kind, at)
            shard.write_bytes(data)


@pytest.mark.parametrize(
    "changed",
    [
        lambda record: record[:7] + bytes([record[7] ^ 1]) + record[8:],
        lambda record: record[:-9] + b"\1" + record[-8:],
        lambda record: record[:-1],
        lambda record: record + b"\0",
        lambda record: b"",
        lambda record: bytes(len(record)),
    ],
    ids=["posterior", "label", "short", "long", "empty", "zeros"],
)
def test_a_record_whose_hash_is_right_and_whose_checksum_is_not(posteriors, tmp_path, changed):
    """As where memory fails before a record is written, or where another program wrote the shard."""
    x, y = posteriors
    path = make(tmp_path / "c", x, y, 230)
    shard = tmp_path / "c" / latents.shard_name(0, 1)
    size, records = shard.stat().st_size, ArrayRecordReader(str(shard)).read_all()
    records[2 * 152] = changed(records[2 * 152])
    writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    assert shard.stat().st_size == size
    cache = latents.LatentCache(path)
    cache.examples([151, 152, 153], [False, True, False])
    with pytest.raises(UserError, match="is damaged: example 152 is not as it was written"):
        cache.examples([151, 152, 153], [False, False, False])
    assert check(path) == {0: "is damaged: 1 of its 230 examples are not as they were written: 152"}


def test_cut_short_missing_and_foreign_shards_are_named(posteriors, tmp_path):
    x, y = posteriors
    path = make(tmp_path / "c", x, y, 100)
    first, second, third = (tmp_path / "c" / latents.shard_name(i, 3) for i in range(3))
    first.write_bytes(first.read_bytes()[:-1000])
    second.unlink()
    third.write_bytes(bytes(third.stat().st_size))  # what a file system may leave after a power cut
    with pytest.raises(ValueError, match=r"00000-of-00003.array_record: has \d+ bytes, not .*and 1 more like it"):
        latents.LatentCache(path)
    problems = check(path)
    assert "cut short" in problems[0] and problems[1] == "is missing"
    assert problems[2] == "is damaged: none of its examples (200 to 229) can be read"


def test_a_manifest_that_is_damaged_missing_or_of_another_format(posteriors, tmp_path):
    x, y = posteriors
    path = make(tmp_path / "c", x, y, 100)
    manifest = tmp_path / "c" / latents.MANIFEST
    whole = manifest.read_bytes()
    for at in (0, whole.index(b"0.18215") + 3, whole.index(b'"sha256"') + 14):
        change(manifest, at)
        with pytest.raises(ValueError, match="manifest.json: is damaged"):
            latents.LatentCache(path)
        manifest.write_bytes(whole)
    for cut in (b"", whole[:200], b"[]", b"\xff"):
        manifest.write_bytes(cut)
        with pytest.raises(ValueError, match="manifest.json: is damaged"):
            latents.LatentCache(path)
    fields = latents.json.loads(whole)
    del fields["sha256"]
    for other in (2, 99):
        latents.write_manifest(path, fields | {"format": other})
        with pytest.raises(ValueError, match=f"format {other}, and this program reads format 3: encode anew"):
            latents.LatentCache(path)
    manifest.unlink()
    with pytest.raises(ValueError, match="manifest.json: does not exist"):
        latents.LatentCache(path)


def test_a_disk_that_is_full_leaves_no_shard(posteriors, tmp_path):
    x, y = posteriors
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = latents.ShardWriter(str(tmp_path), "shard", "float32")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
        with pytest.raises(OSError, match="File too large"):
            writer.add(x, y)
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "shard").exists()


# The command.

SIZE, BROKEN = 16, "b/07.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 3 classes with 23 pictures, of which one is broken."""
    path, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in (("a", 7), ("b", 10), ("c", 6)):
        (path / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((20, 22 + i)).save(
                path / name / f"{i:02d}.png"
            )
    (path / BROKEN).write_bytes(b"no picture")
    return path


@pytest.fixture(scope="module")
def small_vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"), 0)


@pytest.fixture(scope="module")
def encoded(folder, small_vae):
    """encoded(out, **flags): what the command does, in this process, on its four devices."""
    load_once, make, decoder = map(functools.cache, (load, encoder.Encoder, Autoencoder.decoder))

    def run(out, **given):
        f = dict(
            source="folder",
            path=str(folder),
            name=None,
            split="train",
            vae=str(small_vae),
            size=SIZE,
            out=str(out),
            dtype="float16",
            vae_dtype="float32",
            shard_size=8,
            max_skipped=100,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder, "Encoder", make)
            patch.setattr(encode, "load", load_once)
            patch.setattr(Autoencoder, "decoder", decoder)
            return encode.encode(types.SimpleNamespace(**f | given))

    return run


def contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.fixture(scope="module")
def cache(encoded, tmp_path_factory):
    """A finished cache, of three shards."""
    out = tmp_path_factory.mktemp("cache")
    encoded(out)
    return out


def test_the_cache_holds_the_posteriors_of_the_pictures(cache, folder, small_vae):
    source, read = Pictures(Folder(str(folder)), SIZE), latents.LatentCache(str(cache))
    assert len(read) == 22 and read.class_names == ["a", "b", "c"] and read.num_classes == 3 and read.size == SIZE
    [skipped] = read.manifest["skipped"]
    assert skipped["index"] == 14 and skipped["name"] == BROKEN and "no picture" in skipped["reason"]
    assert [shard["count"] for shard in read.manifest["shards"]] == [8, 7, 7]
    loaded = load(str(small_vae))
    assert read.vae == loaded.identity and read.scale == loaded.scale
    indices = [i for i in range(23) if i != 14]
    pictures = np.stack([source.read(i)[0] for i in indices])
    for flip in (False, True):
        batch = read.examples(np.arange(22), np.full(22, flip))
        assert_array_equal(batch["y"], [source.read(i)[1] for i in indices])
        expected = jax.jit(loaded.encode)(loaded.params, pictures[:, :, ::-1] if flip else pictures)
        assert_allclose(batch["x"].astype(np.float32), np.concatenate(expected, -1), rtol=1e-3, atol=1e-3)


def test_a_kill_at_any_moment_changes_nothing(cache, encoded, tmp_path, monkeypatch):
    """Killed before each rename and removal in turn, and resumed: the finished folder is the same to the byte."""

    class Killed(BaseException):
        pass

    real = {name: getattr(os, name) for name in ("replace", "remove")}
    kill_at = 0
    while True:
        count, out = 0, tmp_path / str(kill_at)

        def fatal(name):
            def call(*args):
                nonlocal count
                if str(out) in str(args[0]) and ".probe" not in args[0]:
                    if count == kill_at:
                        raise Killed
                    count += 1
                return real[name](*args)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, fatal(name))
            try:
                encoded(out)
                break
            except Killed:
                pass
        gc.collect()  # closes what a killed process had open
        encoded(out)
        assert contents(out) == contents(cache)
        kill_at += 1
    assert kill_at == 1 + 2 * 3 + 2 + 4 + 1  # settings; shards and records; manifest, preview; removals; the lock


def test_a_shard_whose_record_is_damaged_is_made_again(cache, encoded, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(encoder, "finish", lambda *_: 1 / 0)
        encoded(tmp_path)
    first, second, _ = (tmp_path / encoder.record_file(latents.shard_name(i, 3)) for i in range(3))
    first.write_text(first.read_text().replace('"count": 8', '"count": 7'))
    second.write_text("{}")
    encoded(tmp_path)
    assert "resuming: 1 of 3" in capsys.readouterr().out
    assert contents(tmp_path) == contents(cache)


def test_what_is_damaged_is_named_and_made_again(cache, encoded, tmp_path, capsys):
    out = tmp_path / "cache"
    out.mkdir()
    for name, data in contents(cache).items():
        (out / name).write_bytes(data)
    assert encoder.verify(str(out)) == 0 and "all 3 shards" in capsys.readouterr().out
    encoded(out)
    assert "finished already" in capsys.readouterr().out
    first, second, third = (out / latents.shard_name(i, 3) for i in range(3))
    change(first)
    second.write_bytes(second.read_bytes()[:100])
    third.unlink()
    assert encoder.verify(str(out)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "damaged" in lines[0] and "cut short" in lines[1] and "is missing" in lines[2]
    assert all(str(shard) in line for shard, line in zip((first, second, third), lines))
    assert lines[3].startswith("error: ") and "3 of 3 shards" in lines[3]
    first.unlink()
    encoded(out)
    assert contents(out) == contents(cache) and "another identity" not in capsys.readouterr().out


def test_two_at_once_on_one_folder(cache, encoded, tmp_path, monkeypatch, capsys):
    def twice(*args):
        holder = f"process {os.getpid()} on host {platform.node()} \\(since 20.*\\)"
        with pytest.raises(UserError, match=f"--out={tmp_path}: {holder} is writing there"):
            encoded(tmp_path)
        return finish(*args)

    finish = encoder.finish
    monkeypatch.setattr(encoder, "finish", twice)
    encoded(tmp_path)
    assert contents(tmp_path) == contents(cache)
    encoded(tmp_path)

    def no_locks(*_):
        raise OSError(errno.EBADF, "")  # of a folder on NFS

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    encoded(tmp_path)
    assert f"{tmp_path}: this file system has no locks" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, word",
    [
        ({"size": 24}, "size (16 there, 24 here)"),
        ({"dtype": "float32"}, "dtype (float16 there, float32 here)"),
        ({"shard_size": 9}, "shard_size (8 there, 9 here)"),
        ({"vae_dtype": "bfloat16"}, "vae_dtype"),
        ({"vae": 1}, "vae ("),
        ({"path": 1}, "source ("),
        ({"size": 20}, "--size=20: must be a multiple of 8"),
        ({"vae": None}, "--vae is missing"),
        ({"path": None}, "--path is missing"),
        ({"source": "tfds"}, "--name is missing"),
    ],
    ids=str,
)
def test_another_cache_than_was_begun_is_refused(cache, encoded, folder, given, word, tmp_path):
    if given.get("vae"):
        given = {"vae": str(save_vae(tmp_path, 1))}
    if given.get("path"):
        (tmp_path / "only").mkdir()
        (tmp_path / "only" / "0.png").write_bytes((folder / "a" / "00.png").read_bytes())
        given = {"path": str(tmp_path)}
    before = contents(cache)
    with pytest.raises(UserError) as e:
        encoded(cache, **given)
    assert word in str(e.value) and "\n" not in str(e.value)
    assert contents(cache) == before


def test_what_cannot_be_encoded_stops_the_run_naming_it(encoded, folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=f"more than --max_skipped=0 pictures .*; the last: {BROKEN}: no picture"):
        encoded(tmp_path / "a", max_skipped=0)
    encoded(tmp_path / "a")  # nothing was lost
    out, err = capsys.readouterr()
    assert "22 pictures" in out and "1 skipped" in out and f"skipped: {BROKEN}" in err

    read = Pictures.read
    for wrong in (-1, 3):
        monkeypatch.setattr(Pictures, "read", lambda self, i: (read(self, i)[0], wrong) if i == 5 else read(self, i))
        with pytest.raises(UserError, match=f"a/05.png: its label is {wrong}, and there are 3 classes"):
            encoded(tmp_path / "b")
    monkeypatch.setattr(Pictures, "read", read)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="a/05.png: its latent is not finite"):
        patch.setattr(latents.np, "isfinite", lambda x: np.arange(x.size).reshape(x.shape) // x[0].size != 5)
        encoded(tmp_path / "b")
    with pytest.raises(UserError, match="would be one of its classes"):
        encoded(folder / "latents")
    for name in "abc":
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "0.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 3 pictures can be used, e.g. a/0.jpg"):
        encoded(tmp_path / "c", path=str(tmp_path / "bad"))
    (tmp_path / "b" / "latents-00000-of-00007.array_record").write_bytes(b"")
    with pytest.raises(UserError, match="latents-00000-of-00007.array_record: a shard of another cache"):
        encoded(tmp_path / "b")


@pytest.mark.slow
def test_killed_and_gone_on_with_on_other_hosts_and_devices(command, encoded, folder, small_vae, tmp_path):
    """SIGKILL to the command; SIGTERM to one of two hosts; then to the end on two: as on four devices here."""
    pictures, rng = tmp_path / "pictures", np.random.default_rng(1)
    for name in ("x", "y"):
        (pictures / name).mkdir(parents=True)
        for i in range(400):
            Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(pictures / name / f"{i:03d}.png")
    (pictures / "y" / "200.png").write_bytes(b"no picture")
    many = dict(path=str(pictures), shard_size=5)
    encoded(tmp_path / "one", **many)
    expected = contents(tmp_path / "one")

    def start(out, count=1):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        flags = [f"--path={pictures}", f"--vae={small_vae}", f"--size={SIZE}", "--shard_size=5", f"--out={out}"]
        return [
            command(
                "encode",
                *flags,
                *(
                    [
                        f"--coordinator=localhost:{port}",
                        f"--process_count={count}",
                        f"--process_id={i}",
                        "--host_timeout=10",
                    ]
                    if count > 1
                    else []
                ),
                wait=False,
            )
            for i in range(count)
        ]

    def interrupt(processes, which, how, out, shards):
        done = lambda: sum(name.endswith(".array_record") for name in os.listdir(out)) if out.exists() else 0
        while done() < shards:
            assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
            time.sleep(0.005)
        processes[which].send_signal(how)
        errors = [p.communicate(timeout=60)[1] for p in processes]
        assert shards <= done() < 160 and not (out / latents.MANIFEST).exists()
        return errors

    out = tmp_path / "killed"
    interrupt(start(out), 0, signal.SIGKILL, out, 5)
    processes = start(out, count=2)
    errors = interrupt(processes, 1, signal.SIGTERM, out, 60)
    assert [p.returncode for p in processes] == [hosts.AGAIN] * 2, errors
    assert "host 1: stopped by SIGTERM" in errors[1] and "host 1 stopped: " in errors[0]
    processes = start(out, count=2)
    results = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    assert "799 pictures" in results[0][0] and "resuming: " in results[0][0]
    assert contents(out) == expected
    processes = start(out, count=2)
    results = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    assert "finished already" in results[0][0] and not any(err for _, err in results)
