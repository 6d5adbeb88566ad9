"""Images as 8-bit pictures: conversion, encoding, grids."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def is_picture(channels: int) -> bool:
    """Returns whether images with this number of channels are pictures, grey or colour; otherwise they are latents."""
    return channels in (1, 3)


def to_uint8(images: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Converts images in [-1, 1] to pictures, truncated as in the published code. NaN becomes grey.

    One channel becomes grey. Of latents (neither one channel nor three) the first three channels are shown, at a third
    of their size.
    """
    images = np.nan_to_num(np.asarray(images, np.float32))
    channels = images.shape[-1]
    if not is_picture(channels):
        images = np.pad(images, ((0, 0),) * 3 + ((0, max(0, 3 - channels)),))[..., :3] / 3
    pixels = np.clip(127.5 * images + 128, 0, 255).astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if channels == 1 else pixels


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    """Returns the bytes of a file of this kind ("png", "jpeg"). settings: of Image.save."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Returns the bytes of a PNG."""
    return encoded(Image.fromarray(image), "png")


def grid(images: UInt8[np.ndarray, "n h w 3"], columns: int) -> UInt8[np.ndarray, "height width 3"]:
    """Arranges pictures in rows on white, in order. Pictures smaller than 48 pixels are enlarged."""
    scale = -(-48 // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, _ = images.shape
    rows, gap = -(-n // columns), 2
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[top : top + h, left : left + w] = image
    return canvas
