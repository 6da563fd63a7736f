"""python -m harness.data.decoder: the child's side of `harness/data/decoding.py`; decodes image files to RGB.

Formats are restricted to those that Pillow decodes itself: EPS and PDF would run Ghostscript. Every pixel value means
the same in all images of a data set: nothing is scaled by an image's own range.
"""

import os
import signal
import stat
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.data.decoding import MEMORY_BYTES, SECONDS, SIXTEEN_BITS, Outcome
from harness.run.child import serve
from harness.run.storage import Json

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
ORIENTATION, PHOTOMETRIC = 0x0112, 262  # EXIF and TIFF tags
EXIF_KEYS = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")  # of Pillow's info
ON_BLACK = "transparency, drawn on black"
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
        stored = "".join(str(tile[3]) for tile in getattr(opened, "tile", []))  # Pillow's name of the layout
        if ";16" in stored:
            kinds.append(FROM_16_BITS)
        if opened.format == "TIFF":
            _refuse_misread(opened.tag_v2)  # type: ignore[attr-defined]
        if opened.format == "PNG":
            opened.load()  # its EXIF chunk may come after the pixels
        has_exif = opened.format == "TIFF" or any(name in opened.info for name in EXIF_KEYS)
        is_turned = has_exif and opened.getexif().get(ORIENTATION, 1) in range(2, 9)
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
        transparent_value = opened.info.get("transparency")
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(np.uint32)
            largest = int(grey.max())
            kinds = list(dict.fromkeys([*kinds, FROM_16_BITS]))
            eight_bits = ((grey * 255 + SIXTEEN_BITS // 2) // SIXTEEN_BITS).astype(np.uint8)
            if transparent_value is not None:
                kinds.append(ON_BLACK)
                eight_bits[grey == transparent_value] = 0
            image = Image.fromarray(eight_bits)
        elif transparent_value is not None or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            if scaled := _in_eight_bits(transparent_value, stored):
                image.info["transparency"] = scaled
            kinds.append(ON_BLACK)
            transparent = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), transparent)
        elif image.mode not in ("RGB", "L", "1"):
            kinds.append({"P": "colour palette"}.get(image.mode, f"{image.mode} colours"))
        return image.convert("RGB"), kinds, largest


def _refuse_misread(tags: Mapping[int, Any]) -> None:
    """Raises ValueError where Pillow would read the pixels of a TIFF wrongly."""
    bits, kinds = (value if isinstance(value, tuple) else (value,) for value in (tags.get(258, 1), tags.get(339, 1)))
    if 2 in kinds:
        raise ValueError("32-bit or signed pixels have no fixed range; convert it to 8 or 16 bits")
    if tags.get(284) == 2 and max(bits) > 8:
        raise ValueError("planes of more than 8 bits are not supported; convert it to 8 bits")


def _in_eight_bits(value: object, stored: str) -> object:
    """The transparent value of a PNG as its pixels are after decoding; None if it is that already."""
    if isinstance(value, tuple) and ";16" in stored:
        return tuple(one >> 8 for one in value)
    largest = {"1": 1, "L;2": 3, "L;4": 15}.get(stored)
    return value * 255 // largest if isinstance(value, int) and largest else None


if __name__ == "__main__":
    sys.exit(serve(DecoderServer()))
