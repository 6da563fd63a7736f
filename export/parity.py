"""Parity of an exported file with PyTorch on every test image: exact in float32, otherwise within an accuracy drop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.runtimes import Predict
from harness.run.manifest import ParityRecord
from harness.stats.accuracy import Gate, Outcome

TOLERANCE = 1e-3  # largest logit difference that a float32 export may show
BATCH = 500


@dataclass(frozen=True)
class Parity:
    """How two sets of logits [N, classes] compare; `disagreeing`: images classified differently.

    `lost`: images that only PyTorch classifies correctly, `gained`: that only the exported file does. `allowed_drop`:
    None for float32 files, whose logits must be PyTorch's.
    """

    images: int
    accuracy: float
    torch_accuracy: float
    top1_agreement: float
    max_logit_difference: float
    disagreeing: list[int]
    lost: int
    gained: int
    allowed_drop: float | None

    @property
    def gate(self) -> Gate:
        return Gate.of(self.lost, self.gained, self.images, self.allowed_drop or 0.0)

    @property
    def outcome(self) -> Outcome:
        """Float32: whether logits are within TOLERANCE. Otherwise: the accuracy gate, if the logits are finite."""
        if self.allowed_drop is None:
            return "passes" if self.max_logit_difference <= TOLERANCE else "fails"
        return self.gate.outcome if math.isfinite(self.max_logit_difference) else "fails"

    def __str__(self) -> str:
        text = f"accuracy {100 * self.accuracy:.2f} % (PyTorch {100 * self.torch_accuracy:.2f} %), top-1 agreement "
        text += f"{100 * self.top1_agreement:.2f} %, largest logit difference {self.max_logit_difference:.2e}"
        if self.allowed_drop is None:
            return text if self.outcome == "passes" else f"{text}; more than the tolerance of {TOLERANCE:g}"
        return f"{text}; {self.gate}" if math.isfinite(self.max_logit_difference) else f"{text}; logits are not finite"

    def record(self) -> ParityRecord:
        found = {"accuracy_change": vars(self.gate.change), "outcome": self.outcome, "passed": self.outcome == "passes"}
        return ParityRecord.model_validate(vars(self) | found)


def compare_logits(
    logits: np.ndarray, reference: np.ndarray, labels: np.ndarray, allowed_drop: float | None = None
) -> Parity:
    """Compare `logits` with `reference`, both [N, classes], `labels` [N]; NaN counts as an infinite difference.

    `allowed_drop`: allowed drop in accuracy, 0 to 1, for files that are not exact; None for float32 files.
    """
    difference = np.abs(logits.astype(np.float64) - reference)
    own, expected = logits.argmax(1), reference.argmax(1)
    right, was_right = own == labels, expected == labels
    return Parity(
        images=len(labels),
        accuracy=float(right.mean()),
        torch_accuracy=float(was_right.mean()),
        top1_agreement=float((own == expected).mean()),
        max_logit_difference=float(np.where(np.isfinite(difference), difference, np.inf).max()),
        disagreeing=np.flatnonzero(own != expected).tolist(),
        lost=int((was_right & ~right).sum()),
        gained=int((right & ~was_right).sum()),
        allowed_drop=allowed_drop,
    )


def predict_all(
    predict: Predict, images: np.ndarray, progress: Callable[[int, int], None] = lambda done, total: None
) -> np.ndarray:
    """Logits [N, classes] of all images, computed in batches; `progress` gets (images done, images in all)."""
    found = []
    for i in range(0, len(images), BATCH):
        found.append(predict(images[i : i + BATCH]))
        progress(min(i + BATCH, len(images)), len(images))
    return np.concatenate(found)


def confusion_counts(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images by [true class, predicted class], from logits [N, classes]."""
    counts = np.zeros((logits.shape[1], logits.shape[1]), np.int64)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    return counts


def confident_mistakes(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], count: int = 18
) -> list[dict[str, Any]]:
    """The `count` misclassified images with the highest softmax probability of the wrong class, highest first.

    Each with its row in the split, the names of the true and the predicted class, and that probability.
    """
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exponentials.max(1) / exponentials.sum(1)
    predicted = logits.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    chosen = wrong[np.argsort(-probabilities[wrong], kind="stable")][:count]
    return [
        {
            "row": int(row),
            "label": classes[labels[row]],
            "predicted": classes[predicted[row]],
            "probability": float(probabilities[row]),
        }
        for row in chosen
    ]
