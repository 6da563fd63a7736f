"""Any folder of class folders: `root/train/<class>/*.png`, with `test/` and `val/` of the same form where there are
any, or `root/<class>/*` alone.

Reads PNG, JPEG, BMP, GIF, WebP, TIFF and PPM, also from folders inside a class folder. All images become RGB of 8 bits:
16-bit ones are scaled, transparency is drawn on black, the EXIF orientation is applied. `data.size=N` resizes to NxN;
without it all images must be square and of one size. What was skipped or converted is reported.
"""

import contextlib
import hashlib
import os
import queue
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from harness.config import BadInput, Data
from harness.config.errors import shown
from harness.data.dataset import Decoded, OnProgress, scratch_array
from harness.data.decoding import SIXTEEN_BITS, SUFFIXES, Decoder, Outcome, decoder

# Names of the folders of a part; in lower case, as on the left of a file system that ignores case.
PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "holdout"),
}
FOREIGN = {".heic", ".heif", ".avif", ".jp2", ".tga", ".psd", ".svg", ".eps", ".pdf", ".raw", ".dng", ".nef", ".cr2"}
FOREIGN |= {".npy", ".dcm", ".exr", ".hdr", ".ico"}
CHUNK = 500
TRIED = 20  # images, until one tells the size
IN_ONE_PROCESS = 2_000  # up to this many images, starting more processes costs more than it saves


@dataclass
class Listing:
    """The image files of a part, sorted by class and then by name, with their classes as numbers; `skipped`: files that
    are not read, by the reason."""

    classes: list[str]
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def identity(data: Data) -> str:
    """Digest of every file's name, size and modification time; called by each process, so paths stay strings (fast).

    Raises BadInput where `data.root` is no folder of class folders with images.
    """
    digest = hashlib.sha256()
    root = _root(data)
    for folder in _parts(root).values():
        for path in _listed(root, folder).paths:
            name = os.fsencode(path.removeprefix(f"{root}{os.sep}"))
            size, changed = 0, 0
            with contextlib.suppress(OSError):  # a link to nothing: decoding reports it
                stat = os.stat(path)  # noqa: PTH116
                size, changed = stat.st_size, stat.st_mtime_ns
            digest.update(name + f"\0{size}\0{changed}\n".encode())
    return f"{root} {digest.hexdigest()}"


def decode(data: Data, progress: OnProgress) -> Decoded:
    root = _root(data)
    parts = {part: _listed(root, folder) for part, folder in _parts(root).items()}
    classes = parts["train"].classes
    for part, listing in parts.items():
        if unknown := sorted(set(listing.classes) - set(classes)):
            raise BadInput(
                f"data.root={root}: {part} has class folders that train has not ({', '.join(unknown[:5])}); name the "
                "classes alike in all parts"
            )
        place = [classes.index(name) for name in listing.classes]
        listing.labels = [place[label] for label in listing.labels]
    side = data.size or _common_side(root, parts["train"].paths)
    total = sum(len(listing.paths) for listing in parts.values())
    found, done = Outcome(), 0
    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part, listing in parts.items():
        images = scratch_array((len(listing.paths), side, side, 3), "data.size")
        for outcome, count in _read(listing.paths, side, data.size is not None, images, total):
            found.add(outcome)
            done += count
            progress(done, total)
        arrays[part] = (images, np.asarray(listing.labels, np.int64))
    if found.failed:
        raise BadInput(f"data.root={root}: {_failures(root, found.failed)}")
    notes = tuple(_notes(root, parts, found))
    return Decoded(tuple(classes), arrays["train"], arrays.get("test"), arrays.get("validation"), notes)


def _failures(root: Path, failed: dict[str, str]) -> str:
    """All files that cannot be read, as far as one line has room; then what to do."""
    count = f"{len(failed)} files cannot" if len(failed) > 1 else "a file cannot"
    named: list[str] = []
    for path, reason in failed.items():
        name = path.removeprefix(f"{root}{os.sep}")
        if len(", ".join(named)) + len(name) > 90 and named:
            named.append("...")
            break
        named.append(f"{name} {reason if reason.startswith('is ') else f'({reason})'}")
    return f"{count} be read: {', '.join(named)}; fix or remove them"


def _notes(root: Path, parts: dict[str, Listing], found: Outcome) -> Iterator[str]:
    skipped = sum((listing.skipped for listing in parts.values()), Counter[str]())
    for reason, count in sorted(skipped.items()):
        yield f"skipped {reason}: {count:,}"
    known = {name for names in PARTS.values() for name in names}
    if all(name.lower() in known for name in parts["train"].classes):
        called = " and ".join(shown(name) for name in parts["train"].classes)
        yield f"the classes are called {called}: data.root may be a folder too high"
    loose = sum(_suffix(entry.name) in SUFFIXES for entry in _entries(str(root)) if not _is_folder(entry))
    if loose and _parts(root)["train"] != str(root):
        yield f"skipped images in {shown(root.name)}/, beside its parts: {loose:,}"
    for name in _siblings(root):
        yield f"skipped {shown(name)}/ beside {Path(_parts(root)['train']).name}/, which is no part of the data"
    for kind, count in sorted(found.converted.items()):
        yield f"converted images {'' if kind.startswith('turned') else 'with '}{kind}: {count:,}"
    if found.largest is not None and found.largest <= SIXTEEN_BITS // 4:
        yield (
            f"the largest value of all 16-bit grey images is {found.largest} of {SIXTEEN_BITS}: they become nearly "
            "black; scale them to the whole range"
        )
    if "validation" in parts:
        name = Path(_parts(root)["validation"]).name
        yield f"{name}/ is the validation split; none is drawn from the training images"


def _root(data: Data) -> Path:
    if data.root is None:
        raise BadInput("data.name=images: needs data.root=DIR, a folder of class folders")
    if not data.root.is_dir():
        what = "is a file" if data.root.exists() else "no such folder"
        raise BadInput(f"data.root={data.root}: {what}; give a folder of class folders, or one with train/ and test/")
    return data.root


def _parts(root: Path) -> dict[str, str]:
    """The folder of each part. Raises BadInput where it is not clear which folder is which part."""
    entries = [entry.name for entry in _entries(str(root)) if _is_folder(entry)]
    found = {part: [name for name in entries if name.lower() in names] for part, names in PARTS.items()}
    for part, folders in found.items():
        if len(folders) > 1:
            raise BadInput(f"data.root={root}: {' and '.join(sorted(folders))} could both be {part}; rename one")
    parts = {part: str(root / folders[0]) for part, folders in found.items() if folders}
    if "train" in parts:
        own = {entry.name for entry in _entries(parts["train"]) if _is_folder(entry)}
        for name in _siblings(root):
            if own & {entry.name for entry in _entries(str(root / name)) if _is_folder(entry)}:
                raise BadInput(
                    f"data.root={root}: {name}/ has class folders and would not be read; name it val or test, or move "
                    "it elsewhere"
                )
        return parts
    # Classes may be called test or dev; a folder of class folders may not.
    nested = [
        name for names in found.values() for name in names if any(_is_folder(e) for e in _entries(str(root / name)))
    ]
    if nested:
        raise BadInput(f"data.root={root}: has {nested[0]}/, but no train/; rename the folder of the training images")
    return {"train": str(root)}


def _siblings(root: Path) -> list[str]:
    """Folders beside train/ that are no part."""
    names = sorted(entry.name for entry in _entries(str(root)) if _is_folder(entry))
    if not {name.lower() for name in names} & set(PARTS["train"]):
        return []
    known = {name for names in PARTS.values() for name in names}
    return [name for name in names if name.lower() not in known]


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden. Raises BadInput where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise BadInput(f"data.root: {folder} cannot be read ({error.strerror}); change its permissions") from error


def _listed(root: Path, folder: str) -> Listing:
    """List a part. Raises BadInput where a class has no images or a name is not UTF-8."""
    folders = {entry.name: entry.path for entry in _entries(folder) if _is_folder(entry)}
    listing = Listing(sorted(folders))
    loose = sum(_suffix(entry.name) in SUFFIXES for entry in _entries(folder) if not _is_folder(entry))
    if loose:
        listing.skipped[f"images in {Path(folder).name}/, outside of class folders"] = loose
    for label, name in enumerate(listing.classes):
        if not name.isprintable() or name.encode(errors="replace") != os.fsencode(name):
            raise BadInput(f"data.root={root}: the name of class folder {name!r} is not printable UTF-8; rename it")
        own = sorted(_images(folders[name], listing.skipped))
        if not own:
            raise BadInput(f"data.root={root}: no images in {folders[name]}; add some or remove the folder")
        listing.paths += own
        listing.labels += [label] * len(own)
    if not listing.paths:
        raise BadInput(f"data.root={root}: no class folders with images in {folder}; expected {folder}/<class>/*.png")
    return listing


def _images(folder: str, skipped: Counter[str]) -> Iterator[str]:
    """The image files in a folder and in those inside it; counts what is skipped."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                suffix = _suffix(entry.name)
                if entry.is_dir(follow_symlinks=False):
                    if entry.name.startswith("."):
                        skipped["hidden folders"] += 1
                    else:
                        yield from _images(entry.path, skipped)
                elif entry.name.startswith("."):
                    skipped["hidden files"] += 1
                elif suffix not in SUFFIXES and _is_folder(entry):
                    skipped["linked folders inside class folders"] += 1
                elif suffix in SUFFIXES:
                    yield entry.path
                elif suffix in FOREIGN:
                    skipped[f"{suffix} files, a format that is not read"] += 1
                else:
                    skipped["files that are no images by their names"] += 1
    except RecursionError as error:
        raise BadInput(f"data.root: {folder[:60]}... has folders nested too deeply; give another") from error
    except OSError as error:
        raise BadInput(f"data.root: {folder} cannot be read ({error.strerror}); change its permissions") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _suffix(name: str) -> str:
    return name[name.rfind(".") :].lower() if "." in name else ""


def _common_side(root: Path, paths: list[str]) -> int:
    """The side of the first image that can be read."""
    failed: dict[str, str] = {}
    for path in paths[:TRIED]:
        try:
            width, height = decoder().size(path)
        except ValueError as error:
            failed[path] = str(error)
            continue
        if width != height:
            raise BadInput(f"data.root: {path} is {width}x{height}, not square; give data.size=N to resize all to NxN")
        return width
    raise BadInput(f"data.root={root}: {_failures(root, failed)}")


def _read(paths: list[str], side: int, resize: bool, images: np.memmap, total: int) -> Iterator[tuple[Outcome, int]]:
    """Read into `images`, in several processes if there are many in `total`; yields what happened, and to how many."""
    chunks = range(0, len(paths), CHUNK)
    to, each = Path(str(images.filename)), side * side * 3

    def read(first: int, own: Decoder) -> tuple[Outcome, int]:
        chunk = paths[first : first + CHUNK]
        return own.read(chunk, side, resize, to, images.offset + first * each), len(chunk)

    if total <= IN_ONE_PROCESS:
        yield from (read(first, decoder()) for first in chunks)
        return
    decoders = [Decoder() for _ in range(os.cpu_count() or 1)]
    free: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
    for one in decoders:
        free.put(one)

    def in_turn(first: int) -> tuple[Outcome, int]:
        own = free.get()
        try:
            return read(first, own)
        finally:
            free.put(own)

    pool = ThreadPoolExecutor(len(decoders))
    try:
        yield from pool.map(in_turn, chunks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for one in decoders:
            one.close()
