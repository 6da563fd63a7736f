"""One trial to train, as plain data that another process can read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import Data, Trial
from harness.run.records import HistoryRow, PlanChoice
from harness.run.storage import Json

if TYPE_CHECKING:
    from torch import nn

    from harness.data.splits import Dataset


@dataclass(frozen=True)
class TrainingJob:
    """One trial to train: its configuration, seed and data, and what to record beside its metrics.

    `folder`: where trial.json, history.csv and model.safetensors are written; None keeps everything in memory.
    `fingerprint`: of the expected images; other images fail the trial. `read_test`: evaluate the kept weights on the
    test split at the end. `plan`: the autotuner's choice for settings left to auto. `checkpoint_bytes`: disk limit of
    the trial's checkpoints. `labels`: id, stage, variant, index and parameters of the record.
    Within one process only: `network` replaces the architecture, `dataset` replaces `data`, `callbacks` get each row.
    """

    config: Trial
    data: Data
    seed: int = 0
    folder: Path | None = None
    fingerprint: str | None = None
    read_test: bool = False
    device: str = "auto"
    plan: PlanChoice | None = None
    checkpoint_bytes: float = math.inf
    labels: Mapping[str, object] = field(default_factory=dict)
    network: "nn.Module | None" = None
    dataset: "Dataset | None" = None
    callbacks: Sequence[Callable[[HistoryRow], object]] = ()

    def to_json(self) -> Json:
        """The job as JSON data for another process; asserts that it holds no objects of this one."""
        own = (self.network, self.dataset, self.callbacks or None)
        assert own == (None, None, None), "objects of this process cannot be sent to another"
        return {
            **vars(self),
            "config": self.config.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "folder": self.folder and str(self.folder),
            "plan": self.plan and self.plan.to_json(),
            "callbacks": (),
        }

    @classmethod
    def from_json(cls, values: Json) -> "TrainingJob":
        return cls(
            **{
                **values,
                "config": Trial.model_validate(values["config"]),
                "data": Data.model_validate(values["data"]),
                "folder": values["folder"] and Path(values["folder"]),
                "plan": values["plan"] and PlanChoice.model_validate(values["plan"]),
                "callbacks": (),
            }
        )
