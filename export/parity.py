"""Does an exported file answer like PyTorch? Every test image, in float32."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from export.runtimes import Predict

TOLERANCE = 1e-3  # largest logit difference that a float32 export may show
BATCH = 500


@dataclass(frozen=True)
class Parity:
    """How two sets of logits [N, classes] compare; `uncertain` are images that the difference could flip."""

    images: int
    accuracy: float
    torch_accuracy: float
    top1_agreement: float
    max_logit_difference: float
    disagreeing: list[int]
    uncertain: list[int]

    @property
    def passed(self) -> bool:
        """Within tolerance, and the same class for every image whose margin exceeds twice the largest difference."""
        return self.max_logit_difference <= TOLERANCE and set(self.disagreeing) <= set(self.uncertain)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "passed": self.passed}


def compare(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> Parity:
    """`logits` against `reference`, both [N, classes]; a number that is none counts as an infinite difference."""
    difference = np.abs(logits.astype(np.float64) - reference)
    largest = float(np.where(np.isfinite(difference), difference, np.inf).max())
    own, expected = logits.argmax(1), reference.argmax(1)
    top = np.sort(reference, axis=1)
    margin = top[:, -1] - top[:, -2]
    return Parity(
        images=len(labels),
        accuracy=float((own == labels).mean()),
        torch_accuracy=float((expected == labels).mean()),
        top1_agreement=float((own == expected).mean()),
        max_logit_difference=largest,
        disagreeing=np.flatnonzero(own != expected).tolist(),
        uncertain=np.flatnonzero(margin <= 2 * largest).tolist(),
    )


def predict_all(predict: Predict, images: np.ndarray) -> np.ndarray:
    """Logits [N, classes] of all images, in batches."""
    return np.concatenate([predict(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images by [true class, predicted class], from logits [N, classes]."""
    counts = np.zeros((logits.shape[1], logits.shape[1]), np.int64)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    return counts
