"""Labelled images in memory, decoded once per machine and shared by its processes."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.config import BadInput, Data, plugins
from harness.run.cache import cache_folder

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Decoded:
    """(images uint8 [N, H, W, 3], labels int64 [N]) in a fixed order; `test` is None where there is no test split."""

    classes: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True)
class Split:
    """Rows `rows` of `images` uint8 [M, H, W, 3] and `labels` int64 [M]; `images` may be mapped from disk."""

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test splits. `fingerprint` identifies the images and the split."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str

    @property
    def input_size(self) -> int:
        return int(self.train.images.shape[1])


def dataset_identity(data: Data) -> str:
    """A text that identifies the files without decoding them. Raises BadInput where they are missing."""
    return str(plugins.load("harness.data.datasets", data.name, "identity")(data))


def load_dataset(data: Data, progress: OnProgress | None = None) -> Dataset:
    """Load the data set of `data` from the cache, after decoding it into the cache if needed.

    Raises BadInput where files are missing or unreadable, or cannot be split as `data` says.
    """
    decode = plugins.load("harness.data.datasets", data.name, "decode")
    folder = (
        cache_folder("datasets")
        / hashlib.sha256(f"{data.name} {data.size} {dataset_identity(data)}".encode()).hexdigest()[:16]
    )
    if not folder.is_dir():
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(f"{folder}.lock"):  # one process decodes, the others wait for it
            if not folder.is_dir():
                _store(decode(data, progress or (lambda done, total: None)), folder)
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    return _split(data, tuple(meta["classes"]), meta["sha256"], arrays)


def dataset_of(decoded: Decoded, data: Data) -> Dataset:
    """Make a data set from images in memory, split by `limit`, `classes`, `validation` and `split_seed` of `data`.

    Raises BadInput where there are fewer than two classes, unknown `classes`, or too few images to hold out.
    """
    parts = {"train": decoded.train, "test": decoded.test}
    arrays = {f"{part}_images": images for part, (images, _) in ((p, a) for p, a in parts.items() if a is not None)}
    arrays |= {f"{part}_labels": labels for part, (_, labels) in ((p, a) for p, a in parts.items() if a is not None)}
    return _split(data, decoded.classes, _digest(decoded), arrays)


def _digest(decoded: Decoded) -> str:
    digest = hashlib.sha256(json.dumps(decoded.classes).encode())
    for part, arrays in (("train", decoded.train), ("test", decoded.test)):
        for kind, array in zip(("images", "labels"), arrays or (), strict=False):
            digest.update(f"{part} {kind} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _store(decoded: Decoded, folder: Path) -> None:
    """Write to a temporary name, then rename: an interrupted decode leaves nothing that looks complete."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + "."))
    try:
        for part, arrays in (("train", decoded.train), ("test", decoded.test)):
            for kind, array in zip(("images", "labels"), arrays or (), strict=False):
                np.save(temporary / f"{part}_{kind}.npy", array)
        (temporary / "meta.json").write_text(json.dumps({"classes": decoded.classes, "sha256": _digest(decoded)}))
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _split(data: Data, classes: tuple[str, ...], digest: str, arrays: dict[str, np.ndarray]) -> Dataset:
    if data.classes is not None:
        classes, arrays = _chosen(data, classes, arrays)
    images, labels = arrays["train_images"], arrays["train_labels"]
    if len(classes) < 2:
        raise BadInput(f"data.name={data.name}: one class only ({classes[0]}); a classifier needs two or more")
    rows = np.flatnonzero(labels >= 0)
    if data.limit is not None:
        rows = np.concatenate([rows[labels[rows] == c][: data.limit] for c in range(len(classes))])
    train, validation = _hold_out(labels, rows, data, "validation", classes)
    if "test_images" in arrays:
        test = Split(arrays["test_images"], arrays["test_labels"], np.flatnonzero(arrays["test_labels"] >= 0))
    else:
        train, held_out = _hold_out(labels, train, data, "test", classes)
        test = Split(images, labels, held_out)
    split = f"{digest} {data.limit} {data.validation} {data.split_seed}"
    if data.classes is not None:
        split += f" {json.dumps(data.classes)}"
    return Dataset(
        name=data.name,
        classes=classes,
        train=Split(images, labels, train),
        validation=Split(images, labels, validation),
        test=test,
        fingerprint=hashlib.sha256(split.encode()).hexdigest()[:16],
    )


def _chosen(
    data: Data, classes: tuple[str, ...], arrays: dict[str, np.ndarray]
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """(chosen classes, arrays with labels that index them); images of other classes get label -1."""
    assert data.classes is not None
    for number, name in enumerate(data.classes):
        if name not in classes:
            raise BadInput(f"data.classes={name}: no such class; choose from {', '.join(classes)}")
        if name in data.classes[:number]:
            raise BadInput(f"data.classes={name}: is given twice; leave one out")
    place = np.array([data.classes.index(name) if name in data.classes else -1 for name in classes])
    renamed = {name: place[array] if name.endswith("labels") else array for name, array in arrays.items()}
    return tuple(data.classes), renamed


def _hold_out(
    labels: np.ndarray, rows: np.ndarray, data: Data, purpose: str, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(remaining, held out) rows; draws the fraction `data.validation` of each class with `data.split_seed`."""
    held_out = []
    for c, name in enumerate(classes):
        own = rows[labels[rows] == c]
        count = max(1, round(len(own) * data.validation))
        if len(own) <= count:
            raise BadInput(
                f"data.name={data.name}: class {name} has {len(own)} training images, too few to hold out {count} "
                f"for {purpose}; give more images or leave the class out"
            )
        seed = hashlib.sha256(f"{data.split_seed} {purpose} {c}".encode()).digest()
        held_out.append(np.random.default_rng(list(seed)).permutation(own)[:count])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(rows, chosen), chosen
