"""What a person would rather look at: grids of images."""

import io

import numpy as np
from PIL import Image


def is_picture(channels):
    """Whether images of so many channels are pictures, grey or colour; else they are latents."""
    return channels in (1, 3)


def to_uint8(images):
    """(N, H, W, C) in [-1, 1] -> (N, H, W, 3) uint8, truncated as published; NaN is grey. One channel becomes grey; of
    latents (neither one channel nor three) the first three are shown, at a third of their size."""
    images = np.nan_to_num(np.asarray(images, np.float32))
    channels = images.shape[-1]
    if not is_picture(channels):
        images = np.pad(images, ((0, 0),) * 3 + ((0, max(0, 3 - channels)),))[..., :3] / 3
    images = np.clip(127.5 * images + 128, 0, 255).astype(np.uint8)
    return np.repeat(images, 3, axis=-1) if channels == 1 else images


def encoded(image, kind, **settings):
    """A PIL image -> bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(image):
    """(H, W, 3) uint8 -> bytes of a PNG."""
    return encoded(Image.fromarray(image), "png")


def grid(images, columns):
    """(N, H, W, 3) uint8 -> one picture, row by row, small images enlarged to at least 48 pixels."""
    scale = -(-48 // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, _ = images.shape
    rows, gap = -(-n // columns), 2
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[top: top + h, left: left + w] = image
    return canvas
