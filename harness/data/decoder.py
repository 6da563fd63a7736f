"""python -m harness.data.decoder: the child's side of `harness/data/decoding.py`; decodes image files to RGB.

Formats are restricted to those that Pillow decodes itself: EPS and PDF would run Ghostscript. Every pixel value means
the same in all images of a data set: nothing is scaled by an image's own range.
"""

import os
import signal
import stat
import sys
import warnings
from typing import TYPE_CHECKING

import numpy as np

from harness.data.decoding import MEMORY_BYTES, SECONDS, SIXTEEN_BITS, Outcome
from harness.run.child import serve
from harness.run.storage import Json

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
ORIENTATION, PHOTOMETRIC = 0x0112, 262  # EXIF and TIFF tags
EXIF_KEYS = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")  # of Pillow's info
FROM_16_BITS = "16 bits per channel, scaled to 8"


class DecoderServer:
    """The child's side of `Decoder`."""

    def __init__(self) -> None:
        from PIL import Image

        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    def size(self, path: str, position: str) -> Json:
        try:
            with _limited_time():
                image, _, _ = _rgb(path)
        except Exception as error:
            return {"unreadable": _reason(error)}
        return {"size": image.size}

    def read(self, paths: list[str], side: int, resize: bool, to: str, offset: int, position: str) -> Json:
        found, each = Outcome(), side * side * 3
        with open(to, "r+b") as file, open(position, "w") as at:
            for number, path in enumerate(paths):
                os.pwrite(at.fileno(), str(number).encode(), 0)
                try:
                    with _limited_time():
                        pixels, own = _pixels(path, side, resize)
                except Exception as error:
                    found.failed[path] = _reason(error)
                    continue
                os.pwrite(file.fileno(), pixels, offset + number * each)
                found.add(own)
        return vars(found)


class _limited_time:
    """Ends the process by SIGALRM if the block takes longer than SECONDS, whatever it executes."""

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"decoding it needs more than {MEMORY_BYTES >> 20} MiB"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:120] or type(error).__name__


def _pixels(path: str, side: int, resize: bool) -> tuple[bytes, Outcome]:
    from PIL.Image import Resampling

    image, kinds, largest = _rgb(path)
    if resize:
        image = image.resize((side, side), Resampling.BILINEAR)
    elif image.size != (side, side):
        raise ValueError(f"is {image.width}x{image.height}, the first image {side}x{side}; give data.size=N")
    return image.tobytes(), Outcome(converted=dict.fromkeys(kinds, 1), largest=largest)


def _rgb(path: str) -> "tuple[Image.Image, list[str], int | None]":
    """(RGB image, kinds of conversion, largest value if it is 16-bit grey). Raises where it cannot be read."""
    from PIL import Image, ImageOps

    kinds: list[str] = []
    largest: int | None = None
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
        raise ValueError("is not a regular file")
    with Image.open(path, formats=FORMATS) as opened:
        if getattr(opened, "is_animated", False):
            kinds.append("several frames, of which the first is used")
        if any(";16" in str(tile[3]) for tile in getattr(opened, "tile", [])):
            kinds.append(FROM_16_BITS)
        if opened.format == "PNG":
            opened.load()  # its EXIF chunk may come after the pixels
        has_exif = opened.format == "TIFF" or any(name in opened.info for name in EXIF_KEYS)
        is_turned = has_exif and opened.getexif().get(ORIENTATION, 1) != 1
        opened.load()  # turns a TIFF
        image: Image.Image = opened
        if is_turned:
            image = ImageOps.exif_transpose(opened)
            kinds.append("turned by its EXIF orientation")
        if image.mode == "F" or (image.mode == "I" and opened.format not in ("PNG", "PPM")):
            kind = "float" if image.mode == "F" else "32-bit or signed"
            raise ValueError(f"{kind} pixels have no fixed range; convert it to 8 or 16 bits")
        if image.mode.startswith("I;16") and opened.format == "TIFF" and opened.tag_v2.get(PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
            raise ValueError("16-bit pixels of which 0 is white are not supported; convert it to 8 bits")
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(np.uint32)
            largest = int(grey.max())
            kinds = list(dict.fromkeys([*kinds, FROM_16_BITS]))
            image = Image.fromarray(((grey * 255 + SIXTEEN_BITS // 2) // SIXTEEN_BITS).astype(np.uint8))
        if "transparency" in opened.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            kinds.append("transparency, drawn on black")
            transparent = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), transparent)
        elif image.mode not in ("RGB", "L", "1"):
            kinds.append({"P": "colour palette"}.get(image.mode, f"{image.mode} colours"))
        return image.convert("RGB"), kinds, largest


if __name__ == "__main__":
    sys.exit(serve(DecoderServer()))
