"""Decoding of PNG and JPEG images; damaged files and decompression bombs raise SemidError."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np

from semid.errors import SemidError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000


def load_image(data: bytes, *, size: int) -> Image.Image:
    """Decode a PNG or JPEG file, upright; a large JPEG is decoded at 1/2, 1/4 or 1/8 scale, its sides not below `size`.

    The size in the header is checked before any pixel is decoded. Raises SemidError without the name of the item.
    """
    from PIL import Image, ImageOps

    large = f"image of more than {MAX_PIXELS:,} pixels; scale it down or set it to null"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.draft("RGB", (size, size))
        ImageOps.exif_transpose(image, in_place=True)  # cameras store pictures as their sensor lay
        if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion clips nearly all of it to white
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise SemidError(large) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error):  # Pillow's errors for damaged files
        raise SemidError("not a readable PNG or JPEG image; replace it or set it to null") from None


def image_problem(data: bytes | None) -> str:
    """Why an image file is not readable; "" if it is, or if there is no image."""
    try:
        if data is not None:
            load_image(data, size=1)
    except SemidError as error:
        return str(error)
    return ""
