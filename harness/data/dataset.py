"""Labelled images in memory, decoded once per machine and shared by its processes."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.config import BadInput, Data, plugins
from harness.config.errors import StorageError
from harness.data.splits import Dataset, Digests, split_images
from harness.run.cache import cache_folder
from harness.run.provenance import network_files
from harness.run.storage import storage_errors_of

OnProgress = Callable[[int, int], None]
MOST_IMAGES = 10**9
FORMAT = "2"  # of what is cached: another number decodes again


@dataclass(frozen=True)
class Decoded:
    """(images uint8 [N, H, W, 3], labels int64 [N]) in a fixed order; a part that there is not is None.

    `notes`: what was skipped or converted, one sentence each.
    """

    classes: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray] | None
    validation: tuple[np.ndarray, np.ndarray] | None = None
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The parts that there are, by name."""
        parts = {"train": self.train, "test": self.test, "validation": self.validation}
        return {name: part for name, part in parts.items() if part is not None}


def dataset_identity(data: Data) -> str:
    """A text that identifies the files without decoding them. Raises BadInput where they are missing."""
    identity = plugins.load("harness.data.datasets", data.name, "identity")
    with _own_errors(data, "identity"):
        return str(identity(data))


def load_dataset(data: Data, progress: OnProgress | None = None) -> Dataset:
    """Load the data set of `data` from the cache, after decoding it into the cache if needed.

    Raises BadInput where files are missing or unreadable, or cannot be split as `data` says.
    """
    decode = plugins.load("harness.data.datasets", data.name, "decode")
    identity = f"{data.name} {data.size} {dataset_identity(data)} {FORMAT}"
    if data.name.endswith(".py"):  # other code may decode the same files otherwise
        identity += json.dumps(network_files(data.name))
    folder = cache_folder("datasets") / hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:16]
    if not folder.is_dir():
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(f"{folder}.lock")
        with lock:  # one process decodes, the others wait for it
            try:
                if not folder.is_dir():
                    with _decoding(folder) as place:
                        with _own_errors(data, "decode"):
                            decoded = decode(data, progress or (lambda done, total: None))
                        if not isinstance(decoded, Decoded):
                            kind = type(decoded).__name__
                            raise BadInput(f"data.name={data.name}: decode() returns a {kind}; return a Decoded")
                        with _own_errors(data, "decode", "returns what is no Decoded as described: "):
                            check_arrays(decoded, f"data.name={data.name}")
                            _store(decoded, place)
                        os.replace(place, folder)
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    return split_images(data, tuple(meta["classes"]), meta["sha256"], arrays, tuple(meta["notes"]))


@contextlib.contextmanager
def _own_errors(data: Data, function: str, what: str = "raises ") -> Iterator[None]:
    """Turn errors of a user's FILE.py into BadInput."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, BadInput | StorageError) or not data.name.endswith(".py"):
            raise
        reason = f"{function}() {what}{type(error).__name__}: {error}"
        raise BadInput(f"data.name={data.name}: {reason}; fix it") from error


def dataset_of(decoded: Decoded, data: Data) -> Dataset:
    """Make a data set from images in memory, split by `limit`, `classes`, `validation` and `split_seed` of `data`.

    Raises BadInput where there are fewer than two classes, unknown `classes`, or too few images to hold out.
    """
    check_arrays(decoded, "data")
    arrays = {f"{part}_images": images for part, (images, _) in decoded.parts.items()}
    arrays |= {f"{part}_labels": labels for part, (_, labels) in decoded.parts.items()}
    arrays |= {f"{part}_digests": image_digests(images) for part, (images, _) in decoded.parts.items()}
    try:
        return split_images(data, decoded.classes, _digest(decoded), arrays, decoded.notes)
    except BadInput as error:  # `data` only says how to split
        raise BadInput(str(error).replace(f"data.name={data.name}", "data", 1)) from error


def check_arrays(decoded: Decoded, subject: str) -> None:
    """Raises BadInput where the arrays of a data set have not the form that `Decoded` describes."""
    classes = decoded.classes
    if not isinstance(classes, tuple | list):
        raise BadInput(f"{subject}: classes {type(classes).__name__}: give a tuple of names")
    if any(isinstance(name, str) and (not name.isprintable() or len(name) > 255) for name in classes):
        raise BadInput(f"{subject}: a class has a name that is not printable, or longer than 255 characters; rename it")
    if not all(isinstance(name, str) and name for name in classes) or len(set(classes)) < len(classes):
        raise BadInput(f"{subject}: classes {list(classes)[:5]}: give different names")
    if decoded.train is None:
        raise BadInput(f"{subject}: no train images; give some")
    sides = set()
    for part, (images, labels) in decoded.parts.items():
        shape: tuple[int, ...] = getattr(images, "shape", ())
        kind = getattr(images, "dtype", type(images).__name__)
        if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or not shape[1]:
            raise BadInput(f"{subject}: {part} images {kind} {shape}: give uint8 [N, H, W, 3] with H equal to W")
        if not isinstance(labels, np.ndarray) or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise BadInput(f"{subject}: {part} labels: give integers from 0 on, one per image, as an array [N]")
        if len(images) > MOST_IMAGES:
            raise BadInput(f"{subject}: {len(images):,} {part} images; give at most {MOST_IMAGES:,}")
        if len(images) != len(labels) or not len(images):
            raise BadInput(f"{subject}: {len(images)} {part} images, {len(labels)} labels: give one label per image")
        for label in (labels.min(), labels.max()):
            if not 0 <= label < len(classes):
                raise BadInput(f"{subject}: {part} has the label {label}; give labels from 0 to {len(classes) - 1}")
        sides.add(shape[1])
    if len(sides) > 1:
        raise BadInput(f"{subject}: sides of {' and '.join(map(str, sorted(sides)))} pixels; give all images one size")


def image_digests(images: np.ndarray) -> Digests:
    """A digest of the pixels of each image, uint64 [N]."""
    found = np.empty(len(images), np.uint64)
    for row, image in enumerate(images):
        content = np.ascontiguousarray(image).data
        found[row] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    return found


def _digest(decoded: Decoded) -> str:
    digest = hashlib.sha256(json.dumps(decoded.classes).encode())
    for part, arrays in decoded.parts.items():
        for kind, array in zip(("images", "labels"), arrays, strict=True):
            digest.update(f"{part} {kind} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


_place: Path | None = None  # where this process decodes a data set


@contextlib.contextmanager
def _decoding(folder: Path) -> Iterator[Path]:
    """A folder in which the data set is made: an interrupted decode leaves nothing that looks complete."""
    global _place
    place = folder.with_suffix(".part")
    shutil.rmtree(place, ignore_errors=True)  # of a decode that was killed
    place.mkdir(mode=0o700)
    _place = place
    try:
        with storage_errors_of(place / "images"):
            yield place
    finally:
        _place = None
        shutil.rmtree(place, ignore_errors=True)


def scratch_array(shape: tuple[int, int, int, int], key: str) -> np.memmap:
    """An array uint8 in a file, for `decode` to fill: it takes no memory, and becomes the cached one without a copy.

    Raises BadInput, which names `key` as the way out, where the disk has too little space.
    """
    assert _place is not None, "only decode() may call this"
    needed, free = math.prod(shape), shutil.disk_usage(_place).free
    if needed > free:
        raise BadInput(
            f"{key}: {shape[0]:,} images of {shape[1]}x{shape[1]} need {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free in {_place.parent}; give a smaller {key}, or set HARNESS_CACHE to a "
            "folder on a larger disk"
        )
    name = _place / f"scratch-{uuid.uuid4().hex}.npy"
    array: np.memmap = np.lib.format.open_memmap(name, "w+", np.uint8, shape)
    return array


def _store(decoded: Decoded, folder: Path) -> None:
    meta = {"classes": decoded.classes, "sha256": _digest(decoded), "notes": decoded.notes}
    for part, (images, labels) in decoded.parts.items():
        np.save(folder / f"{part}_labels.npy", labels.astype(np.int64))
        np.save(folder / f"{part}_digests.npy", image_digests(images))
        own = Path(str(images.filename)) if isinstance(images, np.memmap) and images.filename else None
        if own is not None and own.parent == folder:  # a scratch array
            os.replace(own, folder / f"{part}_images.npy")
        else:
            np.save(folder / f"{part}_images.npy", images)
    (folder / "meta.json").write_text(json.dumps(meta))
