"""Decoding of PNG and JPEG files, with faults and decompression bombs as messages."""

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
    """Decode a PNG or JPEG file; a large JPEG at a half, a quarter or an eighth, of sides not below `size`.

    The size in the header is judged before a pixel is decoded. Raises SemidError, which names no item.
    """
    from PIL import Image

    large = f"image of more than {MAX_PIXELS:,} pixels; scale it down or set it to null"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.draft("RGB", (size, size))
        if image.mode.startswith("I"):  # gray of 16 bits, of which Pillow makes white of all but the darkest
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise SemidError(large) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error):  # Pillow's for damaged files
        raise SemidError("not a readable PNG or JPEG image; replace it or set it to null") from None


def image_problem(data: bytes | None) -> str:
    """The fault of an image file; "" for a readable one, and for none."""
    try:
        if data is not None:
            load_image(data, size=1)
    except SemidError as error:
        return str(error)
    return ""
