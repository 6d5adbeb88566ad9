"""Crops of the photographs that come with scikit-learn and matplotlib."""

import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dit_jax.runtime.files import write_aside
from dit_jax.runtime.images import encoded

SIZE = 64


def photographs() -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Returns the photographs that the two packages bring, by name."""
    import matplotlib
    from sklearn.datasets import load_sample_images

    china_and_flower = dict(zip(("china", "flower"), load_sample_images().images))
    hopper = os.path.join(os.path.dirname(matplotlib.__file__), "mpl-data", "sample_data", "grace_hopper.jpg")
    return china_and_flower | {"hopper": np.asarray(Image.open(hopper).convert("RGB"))}


def write_crops(folder: str, per_class: int, rng: np.random.Generator) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Writes random square crops, 128 to 256 pixels a side, as JPEG files FOLDER/CLASS/NUMBER.jpg.

    Returns them scaled to SIZE x SIZE.
    """
    small = []
    for name, photograph in photographs().items():
        height, width, _ = photograph.shape
        for i in range(per_class):
            side = rng.integers(128, 257)
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            crop = Image.fromarray(photograph[top : top + side, left : left + side])
            write_aside(os.path.join(folder, name, f"{i:03d}.jpg"), encoded(crop, "jpeg", quality=95))
            small.append(np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(small)
