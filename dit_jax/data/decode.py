"""From the bytes of a picture file to what the model is trained on: RGB, and the paper's centre crop."""

import io
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from dit_jax.runtime.process import quiet_pillow

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
              ".ppm", ".pgm", ".pbm", ".pnm")
MAX_PIXELS = 178_956_970  # above it Pillow refuses a file as a decompression bomb
MAX_BYTES = 4 * MAX_PIXELS
SMALL, DENSE = 2**24, 2**14  # so many pixels are taken from any file, or so many from each of its bytes

_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}

quiet_pillow()


class BadImage(ValueError):
    """Bytes that are no picture to train on: `reason`, and where it is known the `name` of what was read."""

    def __init__(self, reason, name=""):
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason, self.name = reason, name


def _orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata: viewers show such a picture as it is stored
        return 1


def _to_8_bits(image):
    """A grey picture of more than 8 bits -> mode "L", by the high byte, as Pillow reads 16-bit colour. Its own
    conversion clips at 255 instead."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and image.format != "PPM":
        raise BadImage("32-bit or signed grey values: what is white in it is not defined")
    values = np.asarray(image).astype(np.int32)
    if tags.get(258) == (12,):
        values <<= 4
    if tags.get(262) == 0:  # white is zero
        values = 65535 - values
    return Image.fromarray((values >> 8).astype(np.uint8))


def _rgb(data):
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    name = image.format
    if min(image.size) < 1:
        raise BadImage(f"of size {image.size[0]} x {image.size[1]}")
    if (pixels := image.size[0] * image.size[1]) > max(SMALL, DENSE * len(data)):
        raise BadImage(f"cannot be decoded ({pixels:,} pixels in {len(data):,} bytes: a decompression bomb)")
    frames = 1 if name in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    if frames > 1:
        raise BadImage(f"{name} of {frames} pictures (an animation, or several pages): which one is meant is not known")
    orientation = _orientation(image)
    image.load()
    if name == "TIFF":  # turned by load() already
        orientation = 1
    image.info.pop("transparency", None)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    elif image.mode == "F":
        raise BadImage("floating-point values: what is white in it is not defined")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _is_whole(data):
    """Whether a JPEG or PNG that ends in zeros has its end mark before them. Without it space was made for the file, which
    was then not filled: a decoder takes zeros for grey or black."""
    mark = b"\xff\xd9" if data.startswith(b"\xff\xd8") else b"IEND\xaeB`\x82" if data.startswith(b"\x89PNG") else b""
    return any(data[-16:]) or data.rstrip(b"\0").endswith(mark)


def read_file(path):
    """The bytes of a picture's file. Raises OSError, and BadImage where it is too large for one."""
    if (size := os.path.getsize(path)) > MAX_BYTES:
        raise BadImage(f"{size:,} bytes, more than the {MAX_BYTES:,} that a picture may have")
    with open(path, "rb") as f:
        return f.read()


def decode(data):
    """The bytes of a JPEG, PNG, WebP, BMP, TIFF, PPM or still GIF file -> PIL image of mode RGB, upright by its EXIF
    orientation.

    Alpha is dropped, not blended; CMYK is converted without a colour profile (both as Pillow's convert does, and so the
    published code); 16-bit values keep their high byte; of an MPO the first picture is taken. Raises BadImage for what
    is animated, cut short, damaged, empty, larger than MAX_PIXELS, or no picture. A BMP, uncompressed TIFF, PPM or WebP
    whose tail was never filled cannot be told from a picture that is black there.
    """
    if not data:
        raise BadImage("an empty file")
    if not _is_whole(data):
        raise BadImage("cut short: it ends in zeros, before the picture does")
    try:
        return _rgb(data)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("no picture (or cut short): neither JPEG, PNG, WebP, BMP, TIFF, PPM nor GIF") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels: taken for a decompression bomb") from None
    except Exception as e:  # on damaged files Pillow's readers raise nearly everything
        reason = " ".join(str(e).split()) or type(e).__name__
        raise BadImage(f"cannot be decoded ({reason[:150]})") from None


def center_crop(image, size):
    """PIL RGB image -> uint8 (size, size, 3): halved by box averaging while the shorter side is at least twice `size`,
    then bicubic to `size`, then the middle: the paper's crop, byte for byte."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height}: too long and thin to be cropped to {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(image)[top: top + size, left: left + size]
