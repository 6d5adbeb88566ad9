"""Pictures that are to be measured: .npz files and folders of PNGs, whole and damaged."""

import numpy as np
import pytest

from dit_jax.evaluation import samples
from dit_jax.runtime import images as images_
from dit_jax.runtime.files import write_aside


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(256, size=(7, 6, 6, 3), dtype=np.uint8)


def read(path, size=3):
    return np.concatenate(list(samples.load(str(path)).batches(size)))


def test_the_same_pictures_from_every_kind_of_file(images, tmp_path):
    np.savez(tmp_path / "stored.npz", labels=np.arange(7), arr_0=images)
    np.savez_compressed(tmp_path / "compressed.npz", images)
    for i, image in enumerate(images):
        write_aside(str(tmp_path / "png" / f"{i:06d}.png"), images_.png(image))
    for name in ("stored.npz", "compressed.npz", "png"):
        assert samples.load(str(tmp_path / name)).shape == images.shape
        for size in (1, 3, 7, 100):
            np.testing.assert_array_equal(read(tmp_path / name, size), images)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_and_every_cut_are_noticed(save, images, tmp_path):
    file = tmp_path / "samples.npz"
    save(file, images)
    whole = file.read_bytes()
    for at in range(40, len(whole) - 200, 31):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            same = np.array_equal(read(file), images)  # a byte of the zip's own book-keeping, say a time
        except ValueError as e:
            same = str(file) in str(e)
        assert same, at
    for length in (0, 10, 300, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="samples.npz: is no .npz file, cut short or damaged"):
            read(file)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((3, 4, 4, 3), np.float32), "arr_0 is float32"),
        (np.zeros((3, 3, 4, 4), np.uint8), "(3, 3, 4, 4)"),
        (np.zeros((4, 4, 3), np.uint8), "(4, 4, 3)"),
        (np.asfortranarray(np.zeros((3, 4, 4, 3), np.uint8)), "uint8 of"),
        (np.array([{}]), "object"),
    ],
)
def test_other_arrays_are_refused(array, words, tmp_path):
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(ValueError) as e:
        samples.load(str(tmp_path / "a.npz"))
    assert words in str(e.value) and "a.npz" in str(e.value)


def test_what_is_not_there_is_named(images, tmp_path):
    np.savez(tmp_path / "a.npz", images=images)
    with pytest.raises(ValueError, match="a.npz: has no array 'arr_0'"):
        samples.load(str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="b.npz: no such file or folder"):
        samples.load(str(tmp_path / "b.npz"))
    with pytest.raises(ValueError, match="holds no PNG files"):
        samples.load(str(tmp_path))


def test_a_folder_with_a_damaged_picture_or_of_two_sizes(images, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(images_.png(images[i]))
    (tmp_path / "2.png").write_bytes(images_.png(images[2][:5]))
    with pytest.raises(ValueError, match="2.png: is of 6 x 5 pixels, and 0.png of 6 x 6"):
        read(tmp_path)
    (tmp_path / "2.png").write_bytes(images_.png(images[2])[:60])
    with pytest.raises(ValueError, match="2.png: "):
        read(tmp_path)
