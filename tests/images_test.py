"""Decoding against files written by hand and known colours; sources; imagenet2012 against tfds's own writer."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, tar
from PIL import Image

from dit_jax.data import decode as decode_
from dit_jax.data.decode import BadImage, center_crop, decode
from dit_jax.data.imagenet import TARS, prepare
from dit_jax.data.pictures import Pictures
from dit_jax.data.records import Folder, Tfds
from dit_jax.runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # which pytest turns on again
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 21, 3), np.uint8)


def encoded(image, kind, **args):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **args)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def packed(a, depth):
    """(H, W) values of `depth` bits -> the bytes of its rows."""
    return np.packbits((a[..., None] >> np.arange(depth - 1, -1, -1) & 1).reshape(len(a), -1).astype(bool), axis=1)


def png(a, depth, colour, *more, size=None):
    """A PNG by its specification: a (H, W) or (H, W, channels) of values of `depth` bits."""
    h, w = size or a.shape[:2]
    rows = a.reshape(a.shape[0], -1)
    if depth == 16:
        rows = rows.astype(">u2").view(np.uint8)
    elif depth < 8:
        rows = packed(rows, depth)
    data = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *more, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")))


def tiff(data, width, height, depth, order="<", white_is_zero=False, sample_format=1):
    """A grey TIFF of one strip, by its specification."""
    tags = [
        (256, width),
        (257, height),
        (258, depth),
        (259, 1),
        (262, 0 if white_is_zero else 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(data)),
        (339, sample_format),
    ]
    body = struct.pack(order + "H", len(tags)) + b"".join(
        struct.pack(order + "HHI", tag, 4, 1) + struct.pack(order + "I", value) for tag, value in tags
    )
    return (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data)) + data + body + bytes(4)


def grey(a):
    return np.repeat(np.asarray(a, np.uint8)[..., None], 3, axis=2)


def spread(depth):
    return RNG.integers(0, 2**depth, (13, 21))


def test_crop_is_the_papers():
    cases = sorted((GOLDEN / "crop").glob("out_*.png"))
    assert cases
    for out in cases:
        i, size = re.findall(r"out_(\d+)_(\d+)", out.name)[0]
        cropped = center_crop(decode((GOLDEN / "crop" / f"in_{i}.png").read_bytes()), int(size))
        np.testing.assert_array_equal(cropped, np.asarray(Image.open(out)), strict=True)
    square = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8))
    np.testing.assert_array_equal(center_crop(square, 16), np.asarray(square))
    with pytest.raises(BadImage, match="too long and thin"):
        center_crop(Image.new("RGB", (3000, 1)), 256)


def test_lossless_formats():
    for kind, args in (
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ):
        np.testing.assert_array_equal(np.asarray(decode(encoded(RGB, kind, **args))), RGB, err_msg=kind)
    palette = RNG.integers(0, 256, (16, 3), np.uint8)
    index = RNG.integers(0, 16, (13, 21))
    gif = Image.fromarray(index.astype(np.uint8), "P")
    gif.putpalette(palette.tobytes())
    for data in (encoded(gif, "GIF"), encoded(gif, "GIF", transparency=3), encoded(gif, "BMP"), encoded(gif, "TIFF")):
        np.testing.assert_array_equal(np.asarray(decode(data)), palette[index])


def test_png_of_all_kinds():
    for depth in (1, 2, 4, 8):
        a = spread(depth)
        np.testing.assert_array_equal(decode(png(a, depth, 0)), grey(a * (255 // (2**depth - 1))), f"grey {depth}")
    a = spread(16)
    for more in ((), (chunk(b"tRNS", struct.pack(">H", int(a[0, 0]))),)):  # transparency by one colour is not blended
        np.testing.assert_array_equal(decode(png(a, 16, 0, *more)), grey(a >> 8))
    palette = RNG.integers(0, 256, (16, 3), np.uint8)
    for depth in (1, 2, 4, 8):
        a = RNG.integers(0, min(16, 2**depth), (13, 21))
        for more in ((), (chunk(b"tRNS", bytes(range(0, 160, 10))[: 2**depth]),)):
            data = png(a, depth, 3, chunk(b"PLTE", palette[: 2**depth].tobytes()), *more)
            np.testing.assert_array_equal(decode(data), palette[a], f"palette {depth}")
    for depth in (8, 16):
        a = RNG.integers(0, 2**depth, (13, 21, 4))
        high = (a >> (depth - 8)).astype(np.uint8)
        np.testing.assert_array_equal(decode(png(a[..., :3], depth, 2)), high[..., :3], f"RGB {depth}")
        np.testing.assert_array_equal(decode(png(a, depth, 6)), high[..., :3], f"RGBA {depth}")
        np.testing.assert_array_equal(decode(png(a[..., :2], depth, 4)), grey(high[..., 0]), f"grey and alpha {depth}")


def test_deep_grey():
    a = spread(16)
    for order in "<>":
        data = a.astype(order + "u2").tobytes()
        np.testing.assert_array_equal(decode(tiff(data, 21, 13, 16, order)), grey(a >> 8))
    np.testing.assert_array_equal(
        decode(tiff(a.astype("<u2").tobytes(), 21, 13, 16, white_is_zero=True)), grey(255 - (a >> 8))
    )
    b = RNG.integers(0, 4096, (13, 22))
    np.testing.assert_array_equal(decode(tiff(packed(b, 12).tobytes(), 22, 13, 12)), grey(b >> 4))
    np.testing.assert_array_equal(decode(b"P5 21 13 65535\n" + a.astype(">u2").tobytes()), grey(a >> 8))
    for data in (
        tiff(a.astype("<u4").tobytes(), 21, 13, 32),
        tiff(a.astype("<i2").tobytes(), 21, 13, 16, sample_format=2),
        tiff(a.astype("<f4").tobytes(), 21, 13, 32, sample_format=3),
    ):
        with pytest.raises(BadImage, match="what is white in it is not defined"):
            decode(data)


def ycc(r, g, b):
    return (
        np.array(
            [
                0.299 * r + 0.587 * g + 0.114 * b,
                128 - 0.168736 * r - 0.331264 * g + 0.5 * b,
                128 + 0.5 * r - 0.418688 * g - 0.081312 * b,
            ]
        )
        .round()
        .clip(0, 255)
    )


def test_jpeg_of_all_kinds():
    def flat(values, mode):
        return Image.merge(mode, [Image.new("L", (24, 16), int(v)) for v in values])

    def close(data, colour):
        assert np.abs(np.asarray(decode(data), int) - colour).max() <= 2

    close(encoded(flat((200, 90, 30), "RGB"), "JPEG", quality=100), (200, 90, 30))
    close(encoded(Image.new("L", (24, 16), 77), "JPEG"), (77, 77, 77))
    inks, paper = (180, 60, 20, 50), (60, 157, 189)  # paper: (255 - ink) * (255 - black) / 255
    cmyk = encoded(flat(inks, "CMYK"), "JPEG", quality=100)
    close(cmyk, paper)
    # The same inks with Adobe's marker for YCCK: the inks as Y, Cb, Cr; black as in CMYK.
    stored = encoded(flat((*(255 - ycc(*inks[:3])), inks[3]), "CMYK"), "JPEG", quality=100)
    at = stored.index(b"Adobe") + 11
    assert stored[at] == 0
    close(stored[:at] + b"\2" + stored[at + 1 :], paper)
    two = encoded(flat((200, 90, 30), "RGB"), "MPO", save_all=True, append_images=[flat((0, 0, 0), "RGB")], quality=100)
    assert Image.open(io.BytesIO(two)).format == "MPO"
    close(two, (200, 90, 30))


# What the EXIF orientation says that rows and columns of the stored picture are, as an operation that puts them right.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
    9: lambda a: a,
}


def test_upright():
    for orientation, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind, args in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
            decoded = decode(encoded(RGB, kind, exif=exif, **args))
            np.testing.assert_array_equal(np.asarray(decoded), turn(RGB), f"{kind} {orientation}")
    smooth = np.zeros((32, 48, 3), np.uint8)
    smooth[:16, :16] = 255
    decoded = np.asarray(decode(encoded(smooth, "JPEG", exif=exif_of(6), quality=100)), int)
    assert np.abs(decoded - np.rot90(smooth, -1)).max() <= 2
    damaged = encoded(RGB, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(decode(damaged)), RGB)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def animation(kind):
    return encoded(Image.new("RGB", (9, 9)), kind, save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])


BAD = {
    "empty": (b"", "an empty file"),
    "text": (b"no picture " * 9, "no picture"),
    "gif": (animation("GIF"), "GIF of 2 pictures"),
    "webp": (animation("WEBP"), "WEBP of 2 pictures"),
    "apng": (animation("PNG"), "PNG of 2 pictures"),
    "pages": (animation("TIFF"), "TIFF of 2 pictures"),
    "bomb": (png(np.zeros((1, 1), int), 8, 2, size=(50_000, 50_000)), "decompression bomb"),
    "no rows": (png(np.zeros((1, 1), int), 8, 2, size=(0, 5)), "no picture"),
    "ppm of size 0": (b"P6 0 0 255\n", "no picture"),
    "head of a png": (encoded(RGB, "PNG")[:20], "cannot be decoded"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),  # would be run by Ghostscript
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    data, reason = BAD[case]
    with pytest.raises(BadImage, match=reason) as error:
        decode(data)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_cut_short_or_damaged():
    """Whatever happens to a file, decode returns a picture or raises BadImage."""
    noise = RNG.integers(0, 256, (40, 60, 3), np.uint8)
    for kind in ("JPEG", "PNG"):  # space was made for the file, but not filled to the end
        data = encoded(noise, kind)
        np.testing.assert_array_equal(decode(data + bytes(500)), decode(data))
        for end in (len(data) // 2, len(data) - 40, len(data) - 20):
            with pytest.raises(BadImage, match="cut short: it ends in zeros"):
                decode(data[:end] + bytes(len(data) - end))
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"):
        data = encoded(noise, kind)
        for end in (len(data) // 3, len(data) * 9 // 10):
            with pytest.raises(BadImage):
                decode(data[:end])
        for _ in range(60):
            damaged = bytearray(data)
            for at in RNG.integers(0, len(data), 4):
                damaged[at] = RNG.integers(256)
            try:
                assert decode(bytes(damaged)).mode == "RGB"
            except BadImage as e:
                assert "\n" not in str(e)


def test_a_command_has_no_warnings(tmp_path):
    broken_exif = encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0")
    no_frames = png(RGB.astype(int), 8, 2, chunk(b"acTL", struct.pack(">II", 0, 0)))
    palette = png(spread(1), 1, 3, chunk(b"PLTE", bytes(6)), chunk(b"tRNS", b"\1\2"))
    large = png(np.zeros((1, 1), int), 8, 2, size=(9500, 9500))
    for i, data in enumerate((broken_exif, no_frames, palette, large)):
        (tmp_path / str(i)).write_bytes(data)
    code = """import sys
from dit_jax import cli
from dit_jax.data.decode import BadImage, decode
def main():
    for file in sys.argv[1:]:
        try:
            print(decode(open(file, "rb").read()).size)
        except BadImage as e:
            print(e)
cli.flags.FLAGS.mark_as_parsed()
cli.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, sorted(tmp_path.iterdir()))], cwd=ROOT, text=True, capture_output=True
    )
    assert done.stdout.splitlines()[:3] == ["(21, 13)"] * 3 and "cannot be decoded" in done.stdout and not done.stderr


@pytest.fixture
def folder(tmp_path):
    """Two class folders; colours say which picture it is."""
    root = tmp_path / "pictures"
    for c, (name, count) in enumerate((("cat", 3), ("dog", 4))):
        (root / name / "more").mkdir(parents=True)
        for i in range(count):
            where = root / name / ("more" if i == 1 else "") / f"{i}.{('png', 'PNG', 'bmp')[i % 3]}"
            Image.new("RGB", (40 + i, 30), (c * 100, i * 10, 7)).save(where)
    (root / "cat" / ".hidden.png").write_bytes(b"x")
    return root


def test_folder(folder, capfd):
    raw = Folder(str(folder))
    assert (len(raw), raw.num_classes, raw.class_names) == (7, 2, ["cat", "dog"])
    names = ["cat/0.png", "cat/2.bmp", "cat/more/1.PNG", "dog/0.png", "dog/2.bmp", "dog/3.png", "dog/more/1.PNG"]
    assert [raw[i][0] for i in range(7)] == names
    assert [raw[i][2] for i in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    assert raw[3][1] == (folder / "dog" / "0.png").read_bytes()
    assert capfd.readouterr() == ("", "")
    seen = {raw.identity, Folder(str(folder) + "/").identity}
    assert len(seen) == 1
    (folder / "cat" / "notes.txt").write_text("n")
    (folder / "readme").write_text("n")
    (folder / "stray.jpg").write_text("n")
    assert Folder(str(folder)).identity in seen
    assert "3 files are left out" in capfd.readouterr().out
    (folder / "cat" / "0.png").rename(folder / "cat" / "00.png")
    seen.add(Folder(str(folder)).identity)
    with open(folder / "cat" / "00.png", "ab") as f:
        f.write(b"x")
    seen.add(Folder(str(folder)).identity)
    assert len(seen) == 3


def test_folder_refused(folder, tmp_path):
    def refuses(path, *words):
        with pytest.raises(ValueError) as error:
            Folder(str(path))
        assert "\n" not in str(error.value)
        for word in words:
            assert str(word) in str(error.value)

    refuses(tmp_path / "none", tmp_path / "none", "no such folder")
    refuses("", "no such folder")
    refuses(folder / "cat" / "0.png", "not a folder")
    refuses(folder / "cat" / "more", "no class folders")
    (folder / "emu" / "inner").mkdir(parents=True)
    refuses(folder, folder / "emu", "class folder without pictures")
    (folder / "emu" / "inner" / "a.jpg").symlink_to("nowhere")
    refuses(folder, folder / "emu" / "inner" / "a.jpg", "No such file")
    (folder / "emu" / "inner" / "a.jpg").unlink()
    (folder / "emu" / "inner" / "loop").symlink_to(folder / "emu")
    refuses(folder, "a link to a folder that holds it")
    (folder / "emu" / "inner" / "loop").unlink()
    os.mkfifo(folder / "emu" / "inner" / "b.jpg")
    refuses(folder, folder / "emu" / "inner" / "b.jpg", "not a file but a pipe")
    (folder / "emu" / "inner" / "b.jpg").unlink()
    Image.new("RGB", (9, 9)).save(folder / "emu" / "a.png")
    raw = Folder(str(folder))
    (folder / "emu" / "a.png").unlink()
    with pytest.raises(ValueError, match="emu/a.png: cannot be read"):
        Pictures(raw, 8).examples([7], [False])


def test_pictures(folder, capfd):
    source = Pictures(Folder(str(folder)), 16)
    assert len(source) == 7 and source.can_flip and source.class_names == ["cat", "dog"] and source.num_classes == 2
    assert source.identity != Pictures(source.raw, 32).identity
    batch = source.examples(np.array([6, 0, 2]), [False, True, False])
    assert batch["x"].shape == (3, 16, 16, 3) and batch["x"].dtype == np.uint8 and batch["y"].dtype == np.int32
    assert batch["x"][:, 5, 5].tolist() == [[100, 10, 7], [0, 0, 7], [0, 10, 7]] and batch["y"].tolist() == [1, 0, 0]

    Image.fromarray(RNG.integers(0, 256, (50, 40, 3), np.uint8)).save(folder / "cat" / "0.png")
    (folder / "dog" / "2.bmp").write_bytes(b"")
    (folder / "dog" / "3.png").write_bytes((folder / "dog" / "3.png").read_bytes()[:-40])
    (folder / "dog" / "more" / "1.PNG").write_bytes(animation("GIF"))
    source = Pictures(Folder(str(folder)), 16, max_skipped=3)
    whole = source.examples([0, 0, 4, 5, 6] * 4, [False, True, False, False, True] * 4)
    np.testing.assert_array_equal(whole["x"][1], whole["x"][0][:, ::-1])
    # What is broken is replaced by the next that can be read, here after the last the first.
    assert whole["y"].tolist() == [0] * 20
    np.testing.assert_array_equal(whole["x"][2], whole["x"][0])
    np.testing.assert_array_equal(whole["x"][4], whole["x"][1])
    assert {name: reason.split(" (")[0] for name, reason in source.skipped.items()} == {
        "dog/2.bmp": "an empty file",
        "dog/3.png": "cannot be decoded",
        "dog/more/1.PNG": "GIF of 2 pictures",
    }
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(sum(name in line for line in lines) == 1 for name in source.skipped)
    with pytest.raises(BadImage, match="^dog/2.bmp: an empty file$"):
        source.read(4)
    with pytest.raises(ValueError, match="3 pictures cannot be used, more than max_skipped=2; the last: .*: "):
        Pictures(source.raw, 16, max_skipped=2).examples([4], [False])
    for file in folder.rglob("*.*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 7 pictures"):
        Pictures(source.raw, 16).examples([0], [False])


def test_photographs(tmp_path):
    """Real pictures: what comes out of a JPEG is what Pillow's own steps give."""
    from sklearn.datasets import load_sample_images

    for i, photograph in enumerate(load_sample_images().images):
        (tmp_path / str(i)).mkdir()
        Image.fromarray(photograph).save(tmp_path / str(i) / "p.jpg", quality=90)
    source = Pictures(Folder(str(tmp_path)), 64)
    batch = source.examples([0, 1], [False, False])
    for i in range(2):
        image = Image.open(tmp_path / str(i) / "p.jpg").convert("RGB")  # 640 x 427
        image = image.resize((320, 213), Image.Resampling.BOX).resize((160, 106), Image.Resampling.BOX)
        image = image.resize((97, 64), Image.Resampling.BICUBIC).crop((16, 0, 80, 64))
        np.testing.assert_array_equal(batch["x"][i], np.asarray(image))
    assert batch["y"].tolist() == [0, 1] and len(decode_.EXTENSIONS) == len(set(decode_.EXTENSIONS))


@pytest.fixture(scope="module")
def tfds():
    module = pytest.importorskip("tensorflow_datasets")
    module.disable_progress_bar()
    return module


PALETTE = RNG.integers(0, 256, (16, 3), np.uint8)
INDEX = RNG.integers(0, 16, (6, 9, 12))


def write_set(tfds, path, name="shapes", **features):
    """A set of six palette PNGs that tfds itself has written."""
    if not features:
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["round", "square"])}

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                example = {"image": png(INDEX[i], 4, 3, chunk(b"PLTE", PALETTE.tobytes())), "label": i % 2}
                yield i, {key: example[key] for key in features}

    Shapes.name = name
    Shapes(data_dir=str(path), file_format="array_record").download_and_prepare()
    return path / name / "1.0.0"


def test_tfds(tfds, tmp_path, capfd):
    where = write_set(tfds, tmp_path)
    capfd.readouterr()
    raw = Tfds("shapes", "train", str(tmp_path))
    assert len(raw) == 6 and raw.class_names == ["round", "square"] and raw.num_classes == 2
    seen = set()
    for name, data, label in (raw[i] for i in range(6)):
        [i] = [i for i in range(6) if np.array_equal(decode(data), PALETTE[INDEX[i]])]
        assert label == i % 2
        seen.add((name, i))
    assert {name for name, _ in seen} == {f"shapes/train[{i}]" for i in range(6)} and len({i for _, i in seen}) == 6
    part = Tfds("shapes:1.0.0", "train[2:5]", str(tmp_path))
    assert [part[i][1:] for i in range(3)] == [raw[i][1:] for i in range(2, 5)]
    assert part.identity != raw.identity == Tfds("shapes", "train", str(tmp_path)).identity
    assert Pictures(raw, 6).examples([5, 1], [True, False])["x"].shape == (2, 6, 6, 3)
    assert capfd.readouterr().err == ""

    def refuses(*words, name="shapes", split="train", path=tmp_path, read=False):
        with pytest.raises(ValueError) as error:
            source = Tfds(name, split, str(path))
            if read:
                [source[i] for i in range(len(source))]
        assert "\n" not in str(error.value), str(error.value)
        for word in words:
            assert str(word) in str(error.value), str(error.value)

    before = os.listdir(tmp_path)
    refuses("no such folder", "nowhere", "dit_jax.prepare", path=tmp_path / "nowhere")
    refuses("holds no prepared data set 'mnist'", "array_record", name="mnist")
    refuses("holds no prepared data set", name="shapes:2.0.0")
    refuses("cannot be opened", name="two words")
    assert os.listdir(tmp_path) == before  # nothing was made
    refuses("no split 'test'", "it has train", split="test")
    refuses("empty", split="train[:0]")
    assert write_set(tfds, tmp_path, "unlabelled", image=tfds.features.Image())
    refuses("no feature 'label'", name="unlabelled")
    write_set(tfds, tmp_path, "numbers", image=tfds.features.Image(), label=tfds.features.Scalar(np.int64))
    refuses("no feature 'label' of the kind ClassLabel", name="numbers")

    info = where / "dataset_info.json"
    whole = info.read_text()
    info.write_text(json.dumps(json.loads(whole) | {"fileFormat": "tfrecord"}))
    refuses(where, "tfrecord", "array_record")
    info.write_text(whole[:100])
    refuses("shapes", "cannot be opened")
    info.write_text(whole)

    [shard] = where.glob("*array_record*")
    data = shard.read_bytes()
    flipped = bytearray(data)
    flipped[data.index(PALETTE.tobytes()) + 7] ^= 1
    for damaged in (bytes(flipped), data[: len(data) // 2], data[:-1], b""):
        shard.write_bytes(damaged)
        refuses(shard, "damaged", read=True)
    shard.unlink()
    refuses(shard, "No such file")


@pytest.fixture(scope="module")
def ilsvrc(tfds, tmp_path_factory):
    """The two tar files in small: (folder, {split: {file name: (synset, bytes)}})."""
    root = tmp_path_factory.mktemp("tars")
    resources = [
        tfds.core.tfds_path(f"datasets/imagenet2012/{kind}labels.txt").read_text().split()
        for kind in ("", "validation_")
    ]

    def jpeg():
        return encoded(RNG.integers(0, 256, (20, 30, 3), np.uint8), "JPEG")

    train = {f"{c}_{i}.JPEG": (c, jpeg()) for c in (resources[0][999], resources[0][0], "n01531178") for i in range(7)}
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": (resources[1][i - 1], jpeg()) for i in (777, 1, 50_000, 3)}
    inner = {f"{c}.tar": tar({n: data for n, (d, data) in train.items() if d == c}) for c, _ in train.values()}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar({n: data for n, (_, data) in validation.items()}))
    return root, {"train": train, "validation": validation}


def test_imagenet_is_what_tfds_writes(tfds, ilsvrc, command, tmp_path, monkeypatch):
    root, splits = ilsvrc
    status, out, err = command("prepare", f"--tars={root}", f"--path={tmp_path / 'data'}", "--partial")
    assert status == 0 and not err and "21 pictures, where ILSVRC2012 has 1,281,167" in out, err

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # tfds leaves a folder there

    class Oracle(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name, VERSION = "imagenet2012", tfds.core.Version("5.1.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.builder("imagenet2012", data_dir=str(tmp_path / "none")).info.features
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples(files) for split, files in splits.items()}

        def _generate_examples(self, files):
            for name, (synset, data) in files.items():
                yield name, {"image": data, "label": synset, "file_name": name}

    oracle = Oracle(data_dir=str(tmp_path / "oracle"), file_format="array_record")
    oracle.download_and_prepare()
    ours, theirs = (tmp_path / name / "imagenet2012" / "5.1.0" for name in ("data", "oracle"))
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    for name in ("features.json", "label.labels.txt"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name

    names = (ours / "label.labels.txt").read_text().split()
    assert names == sorted(names) and len(set(names)) == 1000  # the official order: that of the synsets
    for split, files in splits.items():
        raw = Tfds("imagenet2012", split, str(tmp_path / "data"))
        plain, written = (
            tfds.data_source(
                "imagenet2012",
                split=split,
                data_dir=str(tmp_path / where),
                decoders={"image": tfds.decode.SkipDecoding()},
            )
            for where in ("data", "oracle")
        )
        assert list(plain) == list(written)  # in the same order, too
        assert raw.num_classes == 1000 and len(raw) == len(plain) == len(files)
        for record, (name, data, label) in zip(plain, raw, strict=True):
            assert (names[label], data) == files[name]
            assert (record["file_name"].decode(), record["image"], record["label"]) == (name, data, label)
    with pytest.raises(UserError, match="already exists"):
        prepare(str(root), str(tmp_path / "data"), partial=True)


def test_imagenet_refused(ilsvrc, tmp_path):
    root, _ = ilsvrc
    tars = {name: (root / name).read_bytes() for name in os.listdir(root)}
    train, val = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"

    def refuses(partial, files, *words):
        (tmp_path / "tars").mkdir(exist_ok=True)
        for name in (train, val):
            (tmp_path / "tars" / name).unlink(missing_ok=True)
        for name, data in files.items():
            (tmp_path / "tars" / name).write_bytes(data)
        with pytest.raises(UserError) as error:
            prepare(str(tmp_path / "tars"), str(tmp_path / "data"), partial)
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value), str(error.value)
        assert not (tmp_path / "data").exists()

    refuses(False, {}, train, "no such file", "image-net.org")
    refuses(True, {}, "holds neither")
    refuses(False, tars, train, "holds 21 pictures, ILSVRC2012 has 1,281,167", "--partial")
    whole = tars[train]
    for end in (0, 100, 512, 700, len(whole) // 2, whole.rindex(b"JFIF"), len(whole.rstrip(b"\0")) - 1):
        refuses(True, tars | {train: whole[:end]}, train, "cut short")
    header = whole.index(b"_3.JPEG")
    refuses(True, tars | {train: whole[:header] + b"x" + whole[header + 1 :]}, train, "damaged")
    refuses(True, tars | {train: tars[val]}, train, "where a tar for each class is expected")
    refuses(True, tars | {val: tars[train]}, val, "ILSVRC2012_val_00000001.JPEG")
    refuses(True, tars | {val: tars[val][:-20000]}, val, "cut short")


def test_imagenet_goes_on(tfds, ilsvrc, tmp_path, monkeypatch):
    """Stopped between shards and amid one, preparing resumes from what is complete, to the same bytes."""
    from array_record.python import array_record_module
    from tensorflow_datasets.core.utils import shard_utils

    root, _ = ilsvrc
    monkeypatch.setattr(shard_utils.ShardConfig, "get_number_shards", lambda self, size, n: 3)
    prepare(str(root), str(tmp_path / "whole"), partial=True)

    Writer, opened = array_record_module.ArrayRecordWriter, []

    class Dying:
        def __init__(self, path, options):
            opened.append(os.path.basename(path))
            self.writer, self.left = Writer(path, options), 3 if len(opened) == 3 else 1000

        def write(self, record):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            self.writer.write(record)

        def close(self):
            self.writer.close()

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Dying)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(root), str(tmp_path / "parts"), partial=True)
    with pytest.raises(ValueError, match="holds no prepared data set"):
        Tfds("imagenet2012", "train", str(tmp_path / "parts"))
    other = tmp_path / "other"
    other.mkdir()
    (other / TARS["validation"]).symlink_to(root / TARS["validation"])
    with pytest.raises(UserError, match="was begun with other tar files"):
        prepare(str(other), str(tmp_path / "parts"), partial=True)
    prepare(str(root), str(tmp_path / "parts"), partial=True)
    assert len(opened) == 7 and opened[3] == opened[2]
    whole, parts = (tmp_path / name / "imagenet2012" / "5.1.0" for name in ("whole", "parts"))
    assert sorted(os.listdir(whole)) == sorted(os.listdir(parts)) and len(os.listdir(whole)) == 9
    for name in os.listdir(whole):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    raw = Tfds("imagenet2012", "train", str(tmp_path / "parts"))
    assert len(raw) == 21 and len({raw[i][0] for i in range(21)}) == 21
