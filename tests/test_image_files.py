"""Image files as people have them: each kind is read rightly, or refused in one line that names the file."""

import os
import struct
import time
import zlib

import numpy as np
import pytest
from hostile_images import chunk
from image_folders import load, made
from PIL import Image

from harness.config import BadInput
from harness.data import decoding
from harness.data.decoding import read_images
from harness.search.data_check import data_notes


@pytest.fixture
def root(tmp_path):
    return made(tmp_path / "data")


def sixteen_bits(path, values):
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


GRADIENT = np.linspace(0, 65535, 64).reshape(8, 8)
UPRIGHT = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


def turned(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(UPRIGHT).save(path, exif=exif)


def cmyk(path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=95)


def two_frames(path):
    Image.new("RGB", (8, 8), "red").save(path, save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")])


def deep_png(bits, kind, value, transparent=None):
    """Makes a PNG of this depth and colour type, all values equal, with a transparent value: Pillow cannot write it."""
    samples = 24 if kind == 2 else 8
    row = (
        struct.pack(">H", value) * samples
        if bits == 16
        else bytes([value * sum(1 << n for n in range(0, 8, bits))] * bits)
    )
    more = () if transparent is None else (chunk(b"tRNS", struct.pack(">H", transparent) * (samples // 8)),)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)) + chunk(b"IEND", b"")
    return lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + body)


def strange_tiff(path, bits, planar=1, form=1, samples=3):
    """An uncompressed TIFF of 8x8 pixels, all values 40,000 or 200."""
    value = struct.pack("<H", 40000) if bits == 16 else b"\xc8"
    plane = value * 64
    data, count = plane * samples, samples
    start = 8 + 2 + 12 * 11 + 4
    offsets = [start + 200 + n * len(plane) for n in range(samples)] if planar == 2 else [start + 200]
    extra = struct.pack(f"<{count}H", *[bits] * count), struct.pack(f"<{len(offsets)}I", *offsets)
    extra += (struct.pack(f"<{len(offsets)}I", *[len(data) // len(offsets)] * len(offsets)),)
    extra += (struct.pack(f"<{count}H", *[form] * count),)
    places, block = [], b""
    for one in extra:
        places.append(start + len(block))
        block += one + b"\0" * (-len(one) % 4)

    def tag(number, kind, n, value, place=None):
        size = {3: 2, 4: 4}[kind] * n
        return struct.pack("<HHI", number, kind, n) + (
            struct.pack("<I", value) if size <= 4 else struct.pack("<I", place)
        )

    first = {n: int.from_bytes(extra[n][:4].ljust(4, b"\0"), "little") for n in range(4)}
    tags = [tag(256, 4, 1, 8), tag(257, 4, 1, 8), tag(258, 3, count, first[0], places[0]), tag(259, 3, 1, 1)]
    tags += [tag(262, 3, 1, 2 if samples == 3 else 1), tag(273, 4, len(offsets), first[1], places[1])]
    tags += [tag(277, 3, 1, samples), tag(278, 4, 1, 8), tag(279, 4, len(offsets), first[2], places[2])]
    tags += [tag(284, 3, 1, planar), tag(339, 3, count, first[3], places[3])]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + struct.pack("<I", 0)
    path.write_bytes((head + block).ljust(start + 200, b"\0") + data)


# Name of the file, how it is made, the pixels that it must have (or one for all), and what the data check says.
READ = {
    "16-bit PNG": ("a.png", lambda p: sixteen_bits(p, GRADIENT), np.round(GRADIENT / 257), "16 bits per channel"),
    "16-bit TIFF": ("a.tif", lambda p: sixteen_bits(p, GRADIENT), np.round(GRADIENT / 257), "16 bits per channel"),
    "16-bit PGM": (
        "a.pgm",
        lambda p: p.write_bytes(b"P5 8 8 65535\n" + GRADIENT.astype(">u2").tobytes()),
        np.round(GRADIENT.astype(int) / 257),
        "16 bits per channel",
    ),
    "16-bit RGB PNG": ("a.png", deep_png(16, 2, 40000), 40000 // 256, "16 bits per channel"),
    "12 bits in 16": ("a.png", lambda p: sixteen_bits(p, GRADIENT / 16), np.round(GRADIENT / 16 / 257), "nearly black"),
    "EXIF, PNG, upside down": ("a.png", lambda p: turned(p, 3), UPRIGHT[::-1, ::-1], "turned by its EXIF"),
    "EXIF, PNG, turned left": ("a.png", lambda p: turned(p, 6), np.rot90(UPRIGHT, -1), "turned by its EXIF"),
    "EXIF, TIFF, mirrored": ("a.tiff", lambda p: turned(p, 2), UPRIGHT[:, ::-1], "turned by its EXIF"),
    "EXIF, WebP": ("a.webp", lambda p: turned(p, 8), None, "turned by its EXIF"),
    "CMYK": ("a.jpg", cmyk, [255, 0, 0], "CMYK colours"),
    "palette": ("a.png", lambda p: Image.new("P", (8, 8), 3).save(p), None, "colour palette"),
    "LAB": ("a.tif", lambda p: Image.new("LAB", (8, 8), (128, 128, 128)).save(p), None, "LAB colours"),
    "alpha": ("a.png", lambda p: Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(p), 0, "transparency"),
    "grey with alpha": ("a.png", lambda p: Image.new("LA", (8, 8), (200, 255)).save(p), 200, "transparency"),
    "two frames": ("a.gif", two_frames, [255, 0, 0], "several frames"),
    "jfif": ("a.jfif", lambda p: Image.new("L", (8, 8), 90).save(p, "JPEG"), 90, ""),
    "ppm": ("a.ppm", lambda p: Image.new("RGB", (8, 8), (1, 2, 3)).save(p), [1, 2, 3], ""),
    "EXIF of no meaning": ("a.png", lambda p: turned(p, 9), UPRIGHT, ""),
    "16-bit grey, transparent": ("a.png", deep_png(16, 0, 40000, 40000), 0, "transparency"),
    "16-bit grey, another value transparent": ("a.png", deep_png(16, 0, 40000, 3), 156, "transparency"),
    "16-bit RGB, transparent": ("a.png", deep_png(16, 2, 40000, 40000), 0, "on black"),
    "4-bit grey, transparent": ("a.png", deep_png(4, 0, 3, 3), 0, "transparency"),
    "2-bit grey, another value transparent": ("a.png", deep_png(2, 0, 2, 1), 170, "transparency"),
    "planes of 8 bits": ("a.tif", lambda p: strange_tiff(p, 8, planar=2), 200, ""),
    "in a folder": ("2021/may/a.png", lambda p: Image.new("L", (8, 8), 90).save(p), 90, ""),
    "a link": ("a.png", lambda p: p.symlink_to(p.parent / "00.png"), None, "repeat another"),
    "JPEG named png": ("a.png", lambda p: Image.new("L", (8, 8), 90).save(p, "JPEG"), 90, ""),
    "name of spaces and quotes": ("a 'b\" $c.png", lambda p: Image.new("L", (8, 8), 90).save(p), 90, ""),
    "name that is not UTF-8": (os.fsdecode(b"a\xff.png"), lambda p: Image.new("L", (8, 8), 9).save(p, "PNG"), 9, ""),
}


@pytest.mark.parametrize("kind", READ)
def test_what_is_read(kind, root):
    name, make, pixels, said = READ[kind]
    path = root / "cat" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    data = load(root)
    paths = sorted(str(p) for p in (root / "cat").rglob("*.*"))
    found = data.train.images[paths.index(str(path))].astype(int)
    if pixels is not None:
        pixels = np.asarray(pixels)
        wanted = np.broadcast_to(pixels[..., None] if pixels.shape == (8, 8) else pixels, (8, 8, 3))
        assert np.abs(found - wanted).max() <= (3 if path.suffix in (".jpg", ".webp") else 1)
    assert said in "\n".join(data_notes(data, None))


def bomb(path):
    """13,000 x 13,000 pixels in 164 KB."""
    Image.new("1", (13_000, 13_000)).save(path)


def corrupt_middle(path):
    Image.fromarray(UPRIGHT).save(path)
    content = bytearray(path.read_bytes())
    content[60:70] = b"\xff" * 10
    path.write_bytes(content)


REFUSED = {
    "float TIFF": (
        "a.tif",
        lambda p: Image.fromarray(np.ones((8, 8), np.float32)).save(p),
        "float pixels have no fixed",
    ),
    "32-bit TIFF": ("a.tif", lambda p: Image.fromarray(np.ones((8, 8), np.int32)).save(p), "32-bit or signed pixels"),
    "signed TIFF": (
        "a.tif",
        lambda p: Image.fromarray(-np.ones((8, 8), np.int32)).save(p),
        "32-bit or signed pixels",
    ),
    "planes of 16 bits": ("a.tif", lambda p: strange_tiff(p, 16, planar=2), "planes of more than 8 bits"),
    "signed 8 bits": ("a.tif", lambda p: strange_tiff(p, 8, form=2, samples=1), "signed pixels"),
    "EPS named png": (
        "a.png",
        lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
        "no PNG, JPEG",
    ),
    "PDF named jpg": ("a.jpg", lambda p: p.write_bytes(b"%PDF-1.4\n"), "no PNG, JPEG"),
    "icon named png": ("a.png", lambda p: Image.new("RGB", (16, 16)).save(p, "ICO"), "no PNG, JPEG"),
    "empty": ("a.png", lambda p: p.touch(), "no PNG, JPEG"),
    "HTML": ("a.jpg", lambda p: p.write_text("<html>not found</html>"), "no PNG, JPEG"),
    "truncated": ("a.png", lambda p: p.write_bytes((p.parent / "00.png").read_bytes()[:70]), "a.png"),
    "corrupt": ("a.png", corrupt_middle, "a.png"),
    "bomb": ("a.png", bomb, "decompression bomb"),
    "FIFO": ("a.png", os.mkfifo, "is not a regular file"),
    "link to nothing": ("a.png", lambda p: p.symlink_to("/no/where.png"), "No such file"),
    "link to itself": ("a.png", lambda p: p.symlink_to(p), "symbolic links"),
    "link to a device": ("a.png", lambda p: p.symlink_to("/dev/zero"), "is not a regular file"),
    "of another size": ("a.png", lambda p: Image.new("RGB", (9, 9)).save(p), "is 9x9, the first image 8x8"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, root):
    """In one short line that names the file; nothing stays in the cache."""
    name, make, said = REFUSED[kind]
    make(root / "cat" / name)
    before = sorted(os.listdir(os.environ["HARNESS_CACHE"] + "/datasets")) if kind != "bomb" else None
    started = time.monotonic()
    with pytest.raises(BadInput) as refused:
        load(root)
    assert time.monotonic() - started < 20
    text = str(refused.value)
    assert said in text
    assert f"cat/{name}" in text
    assert len(text) <= 300
    assert "\n" not in text
    if before is not None:
        assert sorted(os.listdir(os.environ["HARNESS_CACHE"] + "/datasets")) == before


def test_all_corrupt_files_are_named_at_once(root):
    for number in range(40):
        (root / "dog" / f"x{number}.png").write_text("no image")
    with pytest.raises(BadInput, match=r"40 files cannot be read: dog/x0\.png .*dog/x1\.png .*\.\.\.; fix or remove"):
        load(root)


def test_a_decoder_that_hangs_or_crashes_names_the_file(root, monkeypatch):
    """The child is killed by a signal at one image; those before and after it are read."""
    real = decoding.Child.ask

    def ask(self, do, seconds, **request):
        paths = request.get("paths", [])
        bad = [n for n, path in enumerate(paths) if path.endswith("cat/03.png")]
        if do == "read" and bad:
            with open(request["position"], "w") as position:
                position.write(str(bad[0]))
            self.close()
            raise decoding.ChildDied("its process crashed (SIGSEGV)")
        return real(self, do, seconds, **request)

    monkeypatch.setattr(decoding.Child, "ask", ask)
    with pytest.raises(BadInput, match=r"a file cannot be read: cat/03\.png \(its process crashed \(SIGSEGV\)\); fix"):
        load(root)


def test_single_images(tmp_path):
    """As a command gets them: turned, scaled; a FIFO is refused at once."""
    turned(tmp_path / "a.png", 3)
    sixteen_bits(tmp_path / "b.png", np.full((4, 4), 65535))
    found = read_images([tmp_path / "a.png", tmp_path / "b.png"], 8, "image")
    assert (found[0] == UPRIGHT[::-1, ::-1]).all()
    assert (found[1] == 255).all()
    os.mkfifo(tmp_path / "c.png")
    with pytest.raises(BadInput, match=r"image=.*c\.png: cannot be read as an image: is not a regular file"):
        read_images([tmp_path / "c.png"], 8, "image")
