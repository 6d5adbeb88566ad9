"""Decodes picture files to RGB and crops them as the paper does."""

import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
EXTENSIONS = tuple(".jpg .jpeg .jpe .jfif .mpo .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm".split())
MAX_PIXELS = 178_956_970  # Pillow refuses a larger picture as a decompression bomb
MAX_BYTES = 4 * MAX_PIXELS
PIXELS_PER_FILE, PIXELS_PER_BYTE = 2**24, 2**14  # a file may declare the larger of the two counts

# EXIF orientation -> the operation that turns the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """A file that is not a usable picture. `reason` says why; `name` is the name of the file, or "" if unknown."""

    def __init__(self, reason: str, name: str = ""):
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason, self.name = reason, name


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata: viewers show such a picture as it is stored
        return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Converts a grey picture of more than 8 bits to mode "L" by its high byte, as Pillow reads 16-bit colour. Pillow's
    own conversion of grey clips at 255 instead."""
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and image.format != "PPM":
        raise BadImage("32-bit or signed grey values: what is white in it is not defined")
    values = np.asarray(image).astype(np.int32)
    if tags.get(258) == (12,):
        values <<= 4
    if tags.get(262) == 0:  # white is zero
        values = 65535 - values
    return Image.fromarray((values >> 8).astype(np.uint8))


def _decode_rgb(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    kind = image.format
    width, height = image.size
    if min(width, height) < 1:
        raise BadImage(f"of size {width} x {height}")
    pixels = width * height
    if pixels > max(PIXELS_PER_FILE, PIXELS_PER_BYTE * len(data)):
        raise BadImage(f"cannot be decoded ({pixels:,} pixels in {len(data):,} bytes: a decompression bomb)")
    frames = 1 if kind in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    if frames > 1:
        raise BadImage(f"{kind} of {frames} pictures (an animation, or several pages): which one is meant is not known")
    orientation = _orientation(image)
    image.load()
    if kind == "TIFF":  # load() has turned it
        orientation = 1
    image.info.pop("transparency", None)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    elif image.mode == "F":
        raise BadImage("floating-point values: what is white in it is not defined")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _is_complete(data: bytes) -> bool:
    """False for a JPEG or PNG that ends in zeros without its end mark before them. Space was reserved for such a file,
    but the file was not written to its end; a decoder would take the zeros for grey or black."""
    mark = b""
    if data.startswith(b"\xff\xd8"):
        mark = b"\xff\xd9"
    elif data.startswith(b"\x89PNG"):
        mark = b"IEND\xaeB`\x82"
    return any(data[-16:]) or data.rstrip(b"\0").endswith(mark)


def read_file(path: str | os.PathLike) -> bytes:
    """Returns the bytes of a picture file. Raises OSError, or BadImage if the file is larger than MAX_BYTES."""
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise BadImage(f"{size:,} bytes, more than the {MAX_BYTES:,} that a picture may have")
    with open(path, "rb") as f:
        return f.read()


def decode(data: bytes) -> Image.Image:
    """Returns the picture in a JPEG, PNG, WebP, BMP, TIFF, PPM or still GIF file, in mode RGB and turned upright by its
    EXIF orientation.

    Alpha is dropped, not blended, and CMYK is converted without a colour profile: Pillow's convert does both, and so
    does the published code. 16-bit values keep their high byte. An MPO gives its first picture. Raises BadImage if the
    file is empty, cut short, damaged, animated, larger than MAX_PIXELS, or not a picture. A BMP, uncompressed TIFF, PPM
    or WebP that was not written to its end cannot be told from a picture that is black there.
    """
    if not data:
        raise BadImage("an empty file")
    if not _is_complete(data):
        raise BadImage("cut short: it ends in zeros, before the picture does")
    try:
        return _decode_rgb(data)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("no picture (or cut short): neither JPEG, PNG, WebP, BMP, TIFF, PPM nor GIF") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels: taken for a decompression bomb") from None
    except Exception as e:  # Pillow raises nearly every exception on damaged files
        reason = " ".join(str(e).split()) or type(e).__name__
        raise BadImage(f"cannot be decoded ({reason[:150]})") from None


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Returns the centre of an RGB picture, equal to the published code's `center_crop_arr` byte for byte.

    The picture is halved by box averaging while its shorter side is at least twice `size`; then the shorter side is
    scaled to `size` by bicubic interpolation. Raises BadImage if the scaled picture would exceed MAX_PIXELS.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height}: too long and thin to be cropped to {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]
