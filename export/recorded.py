"""Whether a network that is exported answers as it did when it was trained."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from harness.run.records import TrialRecord, read_correct

TEST = 0.002  # share of test images, classified in float32, that rounding may classify otherwise
VALIDATION = 0.02  # of validation images, which a trial classifies in its own precision
Correct = npt.NDArray[np.bool_]


def check_answers(record: TrialRecord, folder: Path, test: Correct, validation: Callable[[], Correct]) -> None:
    """Compare which test images are classified correctly with the trial's record; where the trial has read none, the
    accuracy on the validation images, which `validation` computes.

    Raises RuntimeError where they differ by more than rounding: the code may be another.
    """
    found, share, kind, recorded = test, TEST, "test", record.metrics.test_accuracy
    before = read_correct(folder, record, len(test))
    if before is None and recorded is None:
        found, share, kind, recorded = validation(), VALIDATION, "validation", record.metrics.val_accuracy
    if before is not None:
        differing = int((before != found).sum())
    elif recorded is not None:
        differing = round(abs(recorded - float(found.mean())) * len(found))
    else:
        return
    if differing > max(2, share * len(found)):
        raise RuntimeError(
            f"the network answers {differing:,} of {len(found):,} {kind} images otherwise than when it was trained: "
            "its code, or the libraries that compute it, have changed; restore them, or give run=NEW"
        )
