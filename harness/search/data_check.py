"""The data check before training: what in a data set makes its results wrong or weak, in one sentence each.

Images are compared by their decoded pixels. A copy of an image stays in the split of the first one, so that no
validation or test image is trained on.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from harness.data.splits import Dataset, Digests, Part
from harness.stats.accuracy import Gate

FEW = 400  # test images: with fewer, an accuracy is known to no better than 5 points
RARE = 10.0  # a class with this many times fewer images than another is worth a sentence
LARGEST = 100_000  # test images that a gate is tried with


def copies_within(digests: Digests) -> int:
    """Number of images that repeat an earlier one."""
    return len(digests) - len(np.unique(digests))


def data_notes(data: Dataset, allowed_drop: float | None) -> list[str]:
    """Sentences about a data set, the decoder's own first. `allowed_drop`: what a lossy export may lose, if one is
    wanted."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    labels = {name: split.labels[split.rows] for name, split in splits.items()}
    notes = [*data.notes, *_copies(data.parts), *_conflicts(data.classes, data.parts), *_classes(data.classes, labels)]
    if allowed_drop is not None and (note := gate_note(len(data.test), allowed_drop)):
        notes.append(note)
    return notes


def _copies(parts: Mapping[str, Part]) -> Iterator[str]:
    for part, (digests, _) in parts.items():
        if count := copies_within(digests):
            yield f"{count:,} of {len(digests):,} {part} images repeat another one of that part" + (
                "; copies stay in one split" if part == "train" else ": they count more than once"
            )
    for part, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        if part in parts and other in parts:
            count = int(np.isin(parts[part][0], parts[other][0]).sum())
            if count:
                yield f"{count:,} {part} images are also {other} images: they are left out of {part}"


def _conflicts(classes: Sequence[str], parts: Mapping[str, Part]) -> Iterator[str]:
    """Images that are in more than one class."""
    digests = np.concatenate([own for own, _ in parts.values()])
    labels = np.concatenate([own for _, own in parts.values()])
    pairs = np.unique(np.stack([digests, labels.astype(np.uint64)]), axis=1)
    images, counts = np.unique(pairs[0], return_counts=True)
    conflicting = images[counts > 1]
    if len(conflicting):
        some = [classes[int(label)] for label in pairs[1][pairs[0] == conflicting[0]]]
        noun = "image has" if len(conflicting) == 1 else "images have"
        yield f"{len(conflicting):,} {noun} more than one class, such as {some[0]} and {some[1]}"


def _classes(classes: Sequence[str], labels: Mapping[str, npt.NDArray[np.int64]]) -> Iterator[str]:
    for split in ("validation", "test"):
        absent = sorted(set(range(len(classes))) - set(labels[split].tolist()))
        if absent:
            yield f"no {split} images of {', '.join(classes[c] for c in absent[:5])}: {split} says nothing about them"
    counts = np.bincount(labels["train"], minlength=len(classes))
    most, fewest = int(counts.argmax()), int(counts.argmin())
    if counts[most] >= RARE * counts[fewest]:
        always = float((labels["test"] == most).mean())
        yield (
            f"unbalanced: {counts[most]:,} training images of {classes[most]}, {counts[fewest]:,} of "
            f"{classes[fewest]}; always answering {classes[most]} is right for {100 * always:.1f} % of the test images"
        )
    if len(labels["test"]) < FEW:
        half = 98 / np.sqrt(len(labels["test"]))
        yield f"only {len(labels['test'])} test images: an accuracy of theirs is uncertain by up to ±{half:.0f} points"


def gate_note(test_images: int, allowed_drop: float) -> str | None:
    """A sentence where no lossy file can pass its gate, because there are too few test images."""
    if Gate.of(0, 0, test_images, allowed_drop).outcome == "passes":
        return None
    low, high = test_images, LARGEST
    if Gate.of(0, 0, high, allowed_drop).outcome != "passes":
        return f"export.max_accuracy_drop={allowed_drop:g} is smaller than {LARGEST:,} test images could show"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if Gate.of(0, 0, middle, allowed_drop).outcome == "passes" else (middle, high)
    return (
        f"{test_images} test images cannot show that int8 loses less than {100 * allowed_drop:g} points; "
        f"{high} could, or a larger export.max_accuracy_drop"
    )
