"""Images as 8-bit pictures: conversion, encoding, grids."""

import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

LEAST = 96  # pixels of a side of a picture in a grid


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


def grid(
    images: UInt8[np.ndarray, "n h w 3"], columns: int, labels: Sequence[str | int] | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """Arranges pictures in rows on white, in order. Those smaller than LEAST pixels are enlarged by a whole factor.

    labels: the name or number of each picture's class, or None. It is written above a column of one class, to the left
    of a row of one class, else below each picture. Of "tench, Tinca tinca" it is the first name, cut to the width.
    """
    scale = -(-LEAST // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, _ = images.shape
    rows, gap = -(-n // columns), 2
    texts = [] if labels is None else [str(label).split(",")[0].strip() for label in labels]
    where, font = _place(texts, columns), _font(w) if texts else None
    line = sum(font.getmetrics()) + gap if font else 0  # the height of a text
    header, caption = line * (where == "above"), line * (where == "below")
    margin = min(2 * w, max(int(font.getlength(text)) for text in texts) + 3 * gap) if font and where == "left" else 0
    canvas = Image.new(
        "RGB", (margin + columns * (w + gap) + gap, header + rows * (h + gap + caption) + gap), (255, 255, 255)
    )
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        left, top = margin + gap + column * (w + gap), header + gap + row * (h + gap + caption)
        canvas.paste(Image.fromarray(image), (left, top))
        if where == "left" and not column:
            draw.text((gap, top + h // 2), _cut(texts[i], margin - 2 * gap, font), "black", font, "lm")
        elif where == "below" or where == "above" and not row:
            y = top + h + gap if where == "below" else gap
            draw.text((left + w // 2, y), _cut(texts[i], w, font), "black", font, "ma")
    return np.asarray(canvas)


def _place(texts, columns):
    """Where the texts of a grid stand: "above" its columns, to the "left" of its rows, or "below" each picture."""
    if not texts:
        return None
    if all(text == texts[i % columns] for i, text in enumerate(texts)):
        return "above"
    return "left" if all(text == texts[i - i % columns] for i, text in enumerate(texts)) else "below"


def _font(width):
    """The font of the texts on pictures of this width: the one that comes with matplotlib, which has accents."""
    import matplotlib

    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, min(24, width // 6))


def _cut(text, width, font):
    """The beginning of a text that fits into `width` pixels, with an ellipsis if it is not the whole."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "\N{HORIZONTAL ELLIPSIS}") > width:
        text = text[:-1]
    return text.rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def class_labels(labels: Iterable[int], names: Sequence[str] | None) -> list[str | int]:
    """The name of each class, for grid; its number where there is no name."""
    return [names[label] if names and label < len(names) else int(label) for label in labels]


def strip(moments: Sequence[UInt8[np.ndarray, "n h w 3"]]) -> UInt8[np.ndarray, "m h w 3"]:
    """Puts the same pictures at several moments in the order of a grid with a row a picture, a column a moment."""
    return np.stack(moments, axis=1).reshape(-1, *moments[0].shape[1:])
