"""Parity of an exported file with PyTorch on every test image: exact in float32, otherwise within an accuracy drop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from export.runtimes import Predict
from harness.run.manifest import Interval, ParityRecord
from harness.stats.intervals import Estimate, mean_interval

TOLERANCE = 1e-3  # largest logit difference that a float32 export may show
BATCH = 500


@dataclass(frozen=True)
class Parity:
    """How two sets of logits [N, classes] compare; `uncertain`: images whose class the difference could flip.

    `lost`: images that only PyTorch classifies correctly, `gained`: that only the exported file does; `mcnemar_p`:
    p-value of the exact test that both are equally likely.
    """

    images: int
    accuracy: float
    torch_accuracy: float
    top1_agreement: float
    max_logit_difference: float
    disagreeing: list[int]
    uncertain: list[int]
    lost: int
    gained: int
    accuracy_change: Estimate
    mcnemar_p: float
    allowed_drop: float | None

    @property
    def passed(self) -> bool:
        """Float32: within TOLERANCE, and the same class for every image whose margin exceeds twice the largest
        difference. Otherwise: finite logits, and the interval of the accuracy change within the allowed drop."""
        if self.allowed_drop is not None:
            return math.isfinite(self.max_logit_difference) and self.accuracy_change.low >= -self.allowed_drop
        return self.max_logit_difference <= TOLERANCE and set(self.disagreeing) <= set(self.uncertain)

    def __str__(self) -> str:
        change = self.accuracy_change
        text = f"accuracy {self.accuracy:.4f} (PyTorch {self.torch_accuracy:.4f}, "
        text += f"change [{100 * change.low:.2f}, {100 * change.high:.2f}] points), top-1 agreement "
        text += f"{self.top1_agreement:.4%}, largest logit difference {self.max_logit_difference:.2e}"
        return text if self.passed else text + "; exceeds what is allowed"

    def record(self) -> ParityRecord:
        change = Interval.model_validate(vars(self.accuracy_change))
        return ParityRecord.model_validate({**vars(self), "accuracy_change": change, "passed": self.passed})


def compare_logits(
    logits: np.ndarray, reference: np.ndarray, labels: np.ndarray, allowed_drop: float | None = None
) -> Parity:
    """Compare `logits` with `reference`, both [N, classes], `labels` [N]; NaN counts as an infinite difference.

    `allowed_drop`: allowed drop in accuracy, 0 to 1, for files that are not exact; None for float32 files.
    """
    difference = np.abs(logits.astype(np.float64) - reference)
    largest = float(np.where(np.isfinite(difference), difference, np.inf).max())
    own, expected = logits.argmax(1), reference.argmax(1)
    top = np.sort(reference, axis=1)
    margin = top[:, -1] - top[:, -2]
    right, was_right = own == labels, expected == labels
    lost, gained = int((was_right & ~right).sum()), int((right & ~was_right).sum())
    return Parity(
        images=len(labels),
        accuracy=float((own == labels).mean()),
        torch_accuracy=float((expected == labels).mean()),
        top1_agreement=float((own == expected).mean()),
        max_logit_difference=largest,
        disagreeing=np.flatnonzero(own != expected).tolist(),
        uncertain=np.flatnonzero(margin <= 2 * largest).tolist(),
        lost=lost,
        gained=gained,
        # Paired by image: most agree, so the interval is far narrower than that of either accuracy.
        accuracy_change=mean_interval((right.astype(float) - was_right).tolist()),
        mcnemar_p=float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0,
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
