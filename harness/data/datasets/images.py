"""Any folder of class folders: `root/train/<class>/*.png` and `root/test/<class>/*.png`, or `root/<class>/*` alone.

Reads PNG, JPEG, BMP, GIF, WebP and TIFF; grey, palette and transparent images become RGB (transparency on black).
`data.size=N` resizes to NxN; without it all images must be square and of one size.
"""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from harness.config import BadInput, Data
from harness.data.dataset import Decoded, OnProgress

if TYPE_CHECKING:
    from PIL import Image


SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
CHUNK = 500
IN_PROCESS = 2_000  # up to this many images, starting processes costs more than it saves


def identity(data: Data) -> str:
    """Digest of every file's name, size and modification time; called by each process, so paths stay strings (fast).

    Raises BadInput where `data.root` is no folder of class folders with images.
    """
    digest = hashlib.sha256()
    root = _root(data)
    for part in _parts(root):
        for path in _files(root, part)[1]:
            stat = os.stat(path)  # noqa: PTH116
            name = path.removeprefix(f"{root}{os.sep}")
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return f"{root} {digest.hexdigest()}"


def decode(data: Data, progress: OnProgress) -> Decoded:
    root = _root(data)
    parts = {part: _files(root, part) for part in _parts(root)}
    classes = next(iter(parts.values()))[0]
    for part, (own, _, _) in parts.items():
        if own != classes:
            different = sorted(set(own) ^ set(classes))
            raise BadInput(f"data.root={root}: {part}/ and train/ have different classes ({', '.join(different)})")
    side = data.size or _common_side(parts["train"][1][0])
    total = sum(len(paths) for _, paths, _ in parts.values())
    _refuse_if_larger_than_memory(root, total, side)
    done = 0
    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part, (_, paths, labels) in parts.items():
        images = np.empty((len(paths), side, side, 3), np.uint8)
        chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
        read = partial(_read, side=side, resize=data.size is not None)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            results = pool.map(read, chunks) if total > IN_PROCESS else map(read, chunks)
            for number, chunk in enumerate(results):
                images[number * CHUNK : number * CHUNK + len(chunk)] = chunk
                done += len(chunk)
                progress(done, total)
        arrays[part] = (images, labels)
    return Decoded(tuple(classes), arrays["train"], arrays.get("test"))


def _root(data: Data) -> Path:
    if data.root is None:
        raise BadInput("data.name=images: needs data.root=DIR, a folder of class folders")
    if not data.root.is_dir():
        what = "is a file" if data.root.exists() else "no such folder"
        raise BadInput(f"data.root={data.root}: {what}; give a folder of class folders, or one with train/ and test/")
    return data.root


def _parts(root: Path) -> list[str]:
    if (root / "train").is_dir():
        return ["train", "test"] if (root / "test").is_dir() else ["train"]
    return ["train"]


def _files(root: Path, part: str) -> tuple[list[str], list[str], np.ndarray]:
    """(classes, file paths, labels int64), sorted by class, then by name."""
    folder = root / part if (root / part).is_dir() else root
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(entry.path for entry in os.scandir(folder / name) if _suffix(entry.name) in SUFFIXES)
        if not own:
            raise BadInput(f"data.root={root}: no images in {folder / name}; add some or remove the folder")
        paths += own
        labels += [label] * len(own)
    if not paths:
        raise BadInput(f"data.root={root}: no class folders with images in {folder}; expected {folder}/<class>/*.png")
    return classes, paths, np.asarray(labels, np.int64)


def _suffix(name: str) -> str:
    return name[name.rfind(".") :].lower()


def _common_side(path: str) -> int:
    width, height = read_rgb(Path(path)).size
    if width != height:
        raise BadInput(f"data.root: {path} is {width}x{height}, not square; give data.size=N to resize all to NxN")
    return width


def _refuse_if_larger_than_memory(root: Path, total: int, side: int) -> None:
    needed, available = total * side * side * 3, psutil.virtual_memory().available
    if needed > available:
        raise BadInput(
            f"data.root={root}: {total:,} images of {side}x{side} need {needed / 2**30:.1f} GiB, "
            f"{available / 2**30:.1f} GiB are free; give a smaller data.size"
        )


def read_rgb(path: Path, key: str = "data.root") -> "Image.Image":
    """Read an image file as RGB. Raises BadInput with `key`, which led to the file, where it is no image."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                transparent = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", image.size, "black"), transparent).convert("RGB")
            return image.convert("RGB")
    except Exception as error:
        raise BadInput(f"{key}: {path} cannot be read as an image ({error}); fix or remove the file") from error


def _read(paths: list[str], side: int, resize: bool) -> np.ndarray:
    """Read images, uint8 [len(paths), side, side, 3]. Raises BadInput where a size differs and not `resize`."""
    from PIL.Image import Resampling

    images = np.empty((len(paths), side, side, 3), np.uint8)
    for row, path in enumerate(paths):
        image = read_rgb(Path(path))
        if resize:
            image = image.resize((side, side), Resampling.BILINEAR)
        elif image.size != (side, side):
            raise BadInput(
                f"data.root: {path} is {image.width}x{image.height}, the first image {side}x{side}; "
                "give data.size=N to resize all to NxN"
            )
        images[row] = np.asarray(image)
    return images
