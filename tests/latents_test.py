import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from dit_jax.data import latents

SHAPE = (4, 4, 3)


def make(folder, x, y, shard_size, dtype="float16"):
    """A cache of posteriors x (N, 2, h, w, 2C) and labels y."""
    folder.mkdir()
    starts = range(0, len(x), shard_size)
    shards = []
    for i, start in enumerate(starts):
        writer = latents.ShardWriter(str(folder), latents.shard_name(i, len(starts)), dtype)
        for row in range(start, min(start + shard_size, len(x)), 5):  # in pieces
            stop = min(row + 5, start + shard_size)
            writer.add(x[row:stop], y[row:stop])
        shards.append(writer.close())
    latents.write_manifest(str(folder), {
        "format": latents.FORMAT, "count": len(x), "num_classes": 1000, "class_names": None, "size": 32, "shape": SHAPE,
        "dtype": dtype, "vae": {"scale": 0.18215, "encoder": "abc"}, "shards": shards})
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


def test_the_same_latents_are_the_same_bytes_and_identity(posteriors, tmp_path):
    x, y = posteriors
    a, b, other = (latents.LatentCache(make(tmp_path / name, x, labels, 100))
                   for name, labels in (("a", y), ("b", y), ("other", y[::-1])))
    assert a.identity == b.identity != other.identity
    for file in latents.sizes(a.path):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def change(file, at=None):
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
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
    with pytest.raises(ValueError, match=r"latents-00001-of-00003.array_record: is damaged: example 152 cannot be read "
                                         r"\(.*hash mismatch"):
        cache.examples(wanted, wanted < 0)
    assert check(path) == {1: "is damaged: 1 of its 100 examples cannot be read: 152"}


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
    latents.write_manifest(path, fields | {"format": 99})
    with pytest.raises(ValueError, match="format 99"):
        latents.LatentCache(path)
    manifest.unlink()
    with pytest.raises(ValueError, match="manifest.json: not there"):
        latents.LatentCache(path)


def test_a_disk_that_is_full_leaves_no_shard(posteriors, tmp_path):
    import resource
    import signal
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
