"""Crops of the photographs that come with scikit-image, scikit-learn and matplotlib.

Their licences, as the packages state them: astronaut (NASA) and rocket (SpaceX) are in the public domain, cat (Stefan
van der Walt) and coffee (Rachel Michetti) are CC0, china and flower are CC BY 2.0 (danielbuechele and vultilion on
Flickr). Of hopper, the U.S. Navy's portrait of Grace Hopper, matplotlib states nothing.
"""

import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dit_jax.runtime.errors import UserError
from dit_jax.runtime.files import write_aside
from dit_jax.runtime.images import encoded

SIZE = 64


def photographs() -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Returns the photographs that scikit-learn and matplotlib bring, by name."""
    import matplotlib
    from sklearn.datasets import load_sample_images

    china_and_flower = dict(zip(("china", "flower"), load_sample_images().images))
    hopper = os.path.join(os.path.dirname(matplotlib.__file__), "mpl-data", "sample_data", "grace_hopper.jpg")
    return china_and_flower | {"hopper": np.asarray(Image.open(hopper).convert("RGB"))}


def more_photographs() -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Returns also those of scikit-image, by name. Raises UserError if it is not installed."""
    try:
        from skimage import data
    except ImportError:
        raise UserError("the photographs need the scikit-image package: pip install -e '.[photos]'") from None
    return photographs() | {
        "astronaut": data.astronaut(),
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
    }


def write_crops(
    folder: str, originals: dict[str, UInt8[np.ndarray, "h w 3"]], per_class: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "n 64 64 3"]:
    """Writes random square crops of photographs as JPEG files FOLDER/CLASS/NUMBER.jpg.

    A crop has 3/4 of the shorter side or more, so that it shows what the photograph is of. Returns the crops in the
    order of the classes' names, scaled to SIZE x SIZE.
    """
    small = []
    for name, photograph in sorted(originals.items()):
        height, width, _ = photograph.shape
        shorter = min(height, width)
        for i in range(per_class):
            side = rng.integers(shorter * 3 // 4, shorter + 1)
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            crop = Image.fromarray(photograph[top : top + side, left : left + side])
            write_aside(os.path.join(folder, name, f"{i:03d}.jpg"), encoded(crop, "jpeg", quality=95))
            small.append(np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(small)
