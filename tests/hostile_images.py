"""Image files whose headers claim what they do not hold, or that take memory or time to decode."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image


def encoded(kind: str, size=(8, 8), **more) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(file, kind, **more)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width=8, height=8, *more: bytes, pixels=b"\0" + bytes(24)) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(more) + chunk(b"IDAT", zlib.compress(pixels * min(height, 8))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def zeros(count: int) -> bytes:
    """`count` zeros, compressed."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(count >> 20)) + packer.flush()


def jpeg_of(width: int, height: int) -> bytes:
    content = encoded("JPEG")
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


def gif_of(width: int, height: int) -> bytes:
    content = encoded("GIF")
    return content[:6] + struct.pack("<HH", width, height) + content[10:]


def bmp_of(width: int, height: int) -> bytes:
    content = encoded("BMP")
    return content[:18] + struct.pack("<ii", width, height) + content[26:]


def tiff(*tags: tuple[int, int, int, int], following=0) -> bytes:
    """A TIFF of one directory; a tag: number, type, count, value."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following)


GREY = ((258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1))


def tiff_of(width: int, height: int, offset=8, count=64, compression=1) -> bytes:
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        *GREY,
        (273, 4, 1, offset),
        (278, 4, 1, height),
        (279, 4, 1, count),
    ]
    tags = [(*tag[:3], compression) if tag[0] == 259 else tag for tag in tags]
    return tiff(*sorted(tags), following=8)


# Name of the file and what makes its content.
LARGE = {
    "PNG of 2^31 pixels a side": ("a.png", lambda: png(2**31 - 1, 2**31 - 1)),
    "PNG of no pixels": ("a.png", lambda: png(0, 0)),
    "PNG of 9,400 pixels a side, cut": ("a.png", lambda: png(9400, 9400)),
    "PNG with 2 GB of text, compressed": ("a.png", lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros(2 << 30)))),
    "PNG with a profile of 2 GB": ("a.png", lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros(2 << 30)))),
    "PNG with a chunk of 2 GB that is not there": (
        "a.png",
        lambda: png()[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt",
    ),
    "JPEG of 65,500 pixels a side": ("a.jpg", lambda: jpeg_of(65500, 65500)),
    "JPEG of 9,400 pixels a side, cut": ("a.jpg", lambda: jpeg_of(9400, 9400)),
    "GIF of 65,535 pixels a side": ("a.gif", lambda: gif_of(65535, 65535)),
    "BMP of 60,000 pixels a side": ("a.bmp", lambda: bmp_of(60000, 60000)),
    "BMP of negative width": ("a.bmp", lambda: bmp_of(-8, 8)),
    "PPM of 60,000 pixels a side": ("a.ppm", lambda: b"P6 60000 60000 255\n" + bytes(100)),
    "PPM of 9,400 pixels a side, cut": ("a.ppm", lambda: b"P6 9400 9400 255\n" + bytes(100)),
    "PPM without an end of its header": ("a.ppm", lambda: b"P6 " + b"9" * 10_000_000),
    "TIFF of 2^31 pixels a side": ("a.tif", lambda: tiff_of(2**31 - 1, 2**31 - 1)),
    "TIFF whose pixels are elsewhere": ("a.tif", lambda: tiff_of(8, 8, offset=2**32 - 1)),
    "TIFF that is its own next page": ("a.tif", lambda: tiff_of(8, 8, offset=2**31, compression=5)),
    "TIFF with a tag of 4 GB": ("a.tif", lambda: tiff((256, 4, 2**30, 8), (257, 4, 1, 8), *GREY)),
    "WebP of 16,383 pixels a side": ("a.webp", lambda: encoded("WEBP", (16383, 8192), lossless=True, method=0)),
}


def write(kind: str, folder: Path) -> None:
    name, content = LARGE[kind]
    (folder / name).write_bytes(content())
