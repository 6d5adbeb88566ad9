"""Crops of the photographs that come with scikit-learn and matplotlib, in class folders."""

import os

import numpy as np
from PIL import Image

from dit_jax.runtime import images as pictures
from dit_jax.runtime.files import write_aside

SIZE = 64


def photographs():
    """{name: (H, W, 3) uint8} of the photographs that come with the packages."""
    import matplotlib
    from sklearn.datasets import load_sample_images

    found = dict(zip(("china", "flower"), load_sample_images().images))
    hopper = os.path.join(os.path.dirname(matplotlib.__file__), "mpl-data", "sample_data", "grace_hopper.jpg")
    return found | {"hopper": np.asarray(Image.open(hopper).convert("RGB"))}


def write_crops(folder, per_class, rng):
    """JPEG files FOLDER/CLASS/NUMBER.jpg of random crops, 128 to 256 pixels a side -> (N, SIZE, SIZE, 3) uint8, scaled."""
    small = []
    for name, photograph in photographs().items():
        height, width, _ = photograph.shape
        for i in range(per_class):
            side = rng.integers(128, 257)
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            crop = Image.fromarray(photograph[top: top + side, left: left + side])
            path = os.path.join(folder, name, f"{i:03d}.jpg")
            write_aside(path, pictures.encoded(crop, "jpeg", quality=95))
            small.append(np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(small)
