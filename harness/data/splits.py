"""Splits the images of a data set into training, validation and test.

An image that is also in a part that is held out is not trained on, and copies of an image stay in one split: images are
compared by the digests of their pixels.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from harness.config import BadInput, Data

Digests = npt.NDArray[np.uint64]  # of images, [N]
Part = tuple[Digests, npt.NDArray[np.int64]]  # digests and labels
PARTS = ("train", "test", "validation")


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
    """Training, validation and test splits. `fingerprint` identifies the images and the split.

    `parts`: digests and labels of the images as they were given, before they were split; `notes`: the decoder's.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    parts: Mapping[str, Part] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def input_size(self) -> int:
        return int(self.train.images.shape[1])


def split_images(
    data: Data, classes: tuple[str, ...], digest: str, arrays: dict[str, np.ndarray], notes: tuple[str, ...]
) -> Dataset:
    """The data set of these arrays (`<part>_images`, `_labels` and `_digests`), split as `data` says.

    `digest`: of all arrays. Raises BadInput where a split would have no images of a class.
    """
    if data.classes is not None:
        classes, arrays = _chosen(data, classes, arrays)
    if len(classes) < 2:
        deeper = f": if its folders are the classes, give data.root=.../{classes[0]}" if data.root else ""
        raise BadInput(f"data.name={data.name}: one class only ({classes[0]}); a classifier needs two or more{deeper}")
    given = {part: np.flatnonzero(arrays[f"{part}_labels"] >= 0) for part in PARTS if f"{part}_labels" in arrays}
    splits = {p: Split(arrays[f"{p}_images"], arrays[f"{p}_labels"], rows) for p, rows in given.items()}
    parts = {p: (arrays[f"{p}_digests"][rows], arrays[f"{p}_labels"][rows]) for p, rows in given.items()}
    images, labels, digests = (arrays[f"train_{kind}"] for kind in ("images", "labels", "digests"))
    rows = given["train"]
    if data.limit is not None:
        rows = np.concatenate([rows[labels[rows] == c][: data.limit] for c in range(len(classes))])
    splits["train"] = Split(images, labels, rows)
    copies = len(np.unique(digests[rows])) < len(rows)
    for part, others in (("train", ("test", "validation")), ("validation", ("test",))):
        for other in others:
            if part in splits and other in parts:
                own = splits[part]
                kept = own.rows[~np.isin(arrays[f"{part}_digests"][own.rows], parts[other][0])]
                copies |= len(kept) < len(own)
                splits[part] = Split(own.images, own.labels, kept)
    rows = splits["train"].rows
    _check_classes(data, classes, labels[rows])
    for part in ("validation", "test"):
        if part not in splits:
            rows, held = _hold_out(labels, digests, rows, data, part, classes)
            splits[part] = Split(images, labels, held)
    for part in ("validation", "test"):
        if not len(splits[part]):
            raise BadInput(f"data.name={data.name}: all {part} images are also in another part; give others")
    split = f"{digest} {data.limit} {data.validation} {data.split_seed}"
    if data.classes is not None:
        split += f" {json.dumps(data.classes)}"
    if copies:
        split += " without copies"
    return Dataset(
        name=data.name,
        classes=classes,
        train=Split(images, labels, rows),
        validation=splits["validation"],
        test=splits["test"],
        fingerprint=hashlib.sha256(split.encode()).hexdigest()[:16],
        parts=parts,
        notes=notes,
    )


def _check_classes(data: Data, classes: Sequence[str], labels: np.ndarray) -> None:
    """Raises BadInput where a class has no training image."""
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        name = classes[int(counts.argmin())]
        raise BadInput(
            f"data.name={data.name}: class {name} has no training image that is not also a validation or test image; "
            "give it others, or leave the class out with data.classes"
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


def _fitting(copies: npt.NDArray[np.int64], count: int) -> list[int]:
    """Positions of the first images that together, with all of their `copies`, are not many more than `count`: one with
    more copies than are still to be held out is left, lest a split is full of one image."""
    found: list[int] = []
    left = count
    for position, own in enumerate(copies.tolist()):
        if own <= left:
            found.append(position)
            left -= own
        if left <= 0:
            break
    return found or [int(copies.argmin())]


def _hold_out(
    labels: np.ndarray, digests: Digests, rows: np.ndarray, data: Data, purpose: str, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(remaining, held out) rows; draws the fraction `data.validation` of each class with `data.split_seed`. Copies of
    an image that is held out are held out too."""
    chosen, (values, counts) = [], np.unique(digests[rows], return_counts=True)
    for c, name in enumerate(classes):
        own = rows[labels[rows] == c]
        count = max(1, round(len(own) * data.validation))
        if len(own) <= count:
            smaller = "" if count == 1 else ", a smaller data.validation"
            raise BadInput(
                f"data.name={data.name}: class {name} has {len(own)} training images, too few to hold out {count} "
                f"for {purpose}; give more images{smaller}, or leave the class out"
            )
        seed = hashlib.sha256(f"{data.split_seed} {purpose} {c}".encode()).digest()
        order = np.random.default_rng(list(seed)).permutation(own)
        copies = counts[np.searchsorted(values, digests[order])]
        chosen.append(order[_fitting(copies, count)])
    is_held = np.isin(digests[rows], digests[np.concatenate(chosen)])
    remaining, held = np.sort(rows[~is_held]), rows[is_held]
    _check_classes(data, classes, labels[remaining])
    return remaining, np.sort(held)
