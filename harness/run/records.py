"""The JSON and CSV files of a run as typed objects, read and written here.

`trial.json` is a TrialRecord, `run.json` a RunRecord; manifest.json is in harness/run/manifest.py, verdict.json in
harness/run/recommendation.py. Unknown fields, which a later version may add, survive reading and writing.
"""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from pydantic import Field

from harness.config import BadInput, Data, Trial
from harness.config.keys import build_config, flatten
from harness.run import storage
from harness.run.chance import is_chance
from harness.run.storage import Json, JsonFile, Share
from harness.run.tables import csv_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TRIAL_FILE, HISTORY_FILE, WEIGHTS_FILE, ERROR_FILE = "trial.json", "history.csv", "model.safetensors", "error.txt"
CORRECT_FILE = "test_correct.npy"

Status = Literal["finished", "stopped", "failed", "diverged", "oom"]


class HistoryRow(TypedDict):
    """A validation: a row of history.csv. Accuracies in [0, 1]; `lr`: the learning rate of the last step."""

    epoch: float
    step: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    lr: float
    seconds: float


HISTORY_COLUMNS = tuple(HistoryRow.__annotations__)


class Metrics(JsonFile):
    """Metrics of the kept weights, None where not measured; `epochs` trained, `macs`: multiply-adds per image.

    `val_chance`: accuracy of always answering the most frequent class of the `val_images` validation images.
    """

    val_accuracy: Share | None = None
    val_loss: float | None = None
    train_accuracy: float | None = None
    train_loss: float | None = None
    test_accuracy: Share | None = None
    test_loss: float | None = None
    epochs: float | None = None
    parameters: int | None = None
    macs: int | None = None
    val_chance: Share | None = None
    val_images: int | None = Field(None, ge=1)

    def of(self, name: str) -> float:
        """A metric by name; `gap`: training minus test accuracy. Raises KeyError where it was not measured."""
        if name == "gap":
            return self.of("train_accuracy") - self.of("test_accuracy")
        value = getattr(self, name, None)
        if value is None:
            raise KeyError(f"{name} was not measured")
        return float(value)


class Timing(JsonFile):
    """Seconds; `ledger`: `wall_seconds` by kind of work (harness/training/timers.py)."""

    wall_seconds: float = 0.0
    ledger: dict[str, float] = Field(default_factory=dict)
    train_seconds: float = 0.0
    validate_seconds: float = 0.0
    images_per_second: float = 0.0


class TrialEnvironment(JsonFile):
    """The machine that a trial ran on, and its execution plan (the fields of ExecutionPlan)."""

    code: str | None = None
    device: str = ""
    precision: str = ""
    compile: str = ""
    memory_format: str = ""
    threads: int = 0
    cores: int = 0
    images_on: str = ""
    gpu: Json | None = None
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    not_checkpointed: str | None = None


class Resumption(JsonFile):
    """A trial continued from the checkpoint of `epoch`; the list has the corrupt ones that were ignored."""

    epoch: int
    torn: list[str] = Field(default_factory=list)


class TrialRecord(JsonFile):
    """trial.json: a trial that has ended."""

    id: str = ""
    stage: str = ""
    variant: str = ""
    index: int = 0
    parameters: Json = Field(default_factory=dict)  # free keys: the values that the space changes
    seed: int
    config: Json  # the configuration trained; the trial's id is derived from it
    status: Status
    metrics: Metrics = Field(default_factory=Metrics)
    timing: Timing = Field(default_factory=Timing)
    environment: TrialEnvironment = Field(default_factory=TrialEnvironment)
    kept_epoch: float | None = None
    continued: list[Resumption] = Field(default_factory=list)
    stop_reason: str | None = None
    error: str | None = None
    compiled_anew: str | None = None
    history_sha256: str | None = None
    weights_sha256: str | None = None
    correct_sha256: str | None = None

    @property
    def trial(self) -> Trial:
        return build_config(Trial, self.config, f"trial {self.id}: ")

    def row(self) -> Json:
        """A row of trials.csv: nested fields by dotted key; those of `config` have their command-line keys."""
        return flatten({"trial" if name == "config" else name: value for name, value in self.to_json().items()})

    @property
    def is_done(self) -> bool:
        """Whether the same command skips this trial; failed trials and those stopped by the time budget run
        again."""
        if self.status == "stopped":
            return self.stop_reason != "time budget"
        return self.status in ("finished", "diverged")

    @property
    def is_failure(self) -> bool:
        """Whether the trial ended without a usable network: this counts against its configuration."""
        return self.status in ("diverged", "failed", "oom")

    @property
    def is_at_chance(self) -> bool:
        """Whether the trial finished without having learned anything that validation shows."""
        metrics = self.metrics
        if self.status != "finished" or metrics.val_chance is None or metrics.val_accuracy is None:
            return False
        each = self.config.get("validations_per_epoch")
        looks = min(1e9, max(1.0, (metrics.epochs or 1) * (each if isinstance(each, int) else 1)))
        best = self.config.get("keep", "best") == "best"
        return is_chance(metrics.val_accuracy, metrics.val_chance, metrics.val_images or 0, int(looks) if best else 1)

    @property
    def is_tested(self) -> bool:
        return self.status == "finished" and self.metrics.test_accuracy is not None

    @property
    def configuration_name(self) -> str:
        """The configuration's name for display: its variant, or the number of its sample."""
        if self.variant:
            return self.variant
        return "base" if self.index == 0 and not self.parameters else f"sample {self.index}"


class DataRecord(JsonFile):
    """The images of a run: classes, side in pixels, number of images per split and class; `notes`: what the data check
    found."""

    classes: list[str]
    fingerprint: str
    input_size: int
    train: int = Field(ge=1)
    validation: int = Field(ge=1)
    test: int = Field(ge=1)
    test_by_class: list[int] = Field(default_factory=list)
    validation_by_class: list[int] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class PlanChoice(JsonFile):
    """Execution plan of an architecture's trials: measured, or by rule for the reason in `by_rule`."""

    by_rule: str | None = None
    compile: str = ""
    memory_format: str = ""
    device: str = ""
    precision: str = ""
    threads: int = 0
    images: float = 0.0
    short_of_time: bool = False
    images_per_second: dict[str, float] = Field(default_factory=dict)
    first_seconds: dict[str, float] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    from_cache: bool = False
    seconds: float = 0.0


class LookRecord(JsonFile):
    """A look at the claims after `seeds` seeds of each variant: `alpha`, the error probability that it may spend; how
    many of the claims are settled then."""

    seeds: int
    alpha: float
    claims: int
    settled: int


class RunRecord(JsonFile):
    """run.json: the run's configuration, data and code, and what earlier commands recorded."""

    config: Json  # of the last command, in the format of its version
    identity: Json
    data: DataRecord
    weights: dict[str, str] = Field(default_factory=dict)
    pinned: Json = Field(default_factory=dict)
    parameters: dict[str, str] = Field(default_factory=dict)
    variants: dict[str, Json] = Field(default_factory=dict)
    claims: list[Json] = Field(default_factory=list)
    published: dict[str, float] = Field(default_factory=dict)
    commands: list[str] = Field(default_factory=list)
    plans: dict[str, PlanChoice] = Field(default_factory=dict)
    code: dict[str, dict[str, str]] = Field(default_factory=dict)
    looks: list[LookRecord] = Field(default_factory=list)
    network_notes: list[str] = Field(default_factory=list)
    environment: Json = Field(default_factory=dict)

    @property
    def metric(self) -> str:
        with contextlib.suppress(KeyError, TypeError):
            if (metric := self.config["search"]["metric"]) in ("val_accuracy", "val_loss"):
                return str(metric)
        raise BadInput("run.json: its config has no search.metric; another version of this project wrote it")

    @property
    def data_config(self) -> Data:
        return build_config(Data, self.config.get("data", {}), "run.json: data.")


def write_trial(folder: Path, record: TrialRecord) -> TrialRecord:
    """Write the record as a trial's last file: trial.json marks it as ended. Returns it with the history's SHA-256."""
    written = record.model_copy()
    if (folder / HISTORY_FILE).is_file():
        written.history_sha256 = storage.sha256(folder / HISTORY_FILE)
    written.write(folder / TRIAL_FILE)
    return written


def read_trial(folder: Path) -> TrialRecord:
    """Read the record of a trial that ended. Raises Corrupt, or BadInput where another version wrote it."""
    return TrialRecord.read(folder / TRIAL_FILE)


def read_if_ended(folder: Path) -> TrialRecord | None:
    """Read the record of a trial; None if the trial has not ended or its record is corrupt.

    Raises BadInput where another version wrote it.
    """
    with contextlib.suppress(OSError, storage.Corrupt):
        return read_trial(folder)
    return None


def write_correct(folder: Path, correct: "npt.NDArray[np.bool_]") -> str:
    """Write which images of the test split, in order, a trial classifies correctly, eight in a byte; returns the
    SHA-256."""
    import numpy as np

    storage.write_array(folder / CORRECT_FILE, np.packbits(correct))
    return storage.sha256(folder / CORRECT_FILE)


def read_correct(folder: Path, record: TrialRecord, images: int) -> "npt.NDArray[np.bool_] | None":
    """Which of the test `images` the trial classifies correctly; None if that was not kept or is corrupt."""
    import numpy as np

    if record.correct_sha256 is None or not storage.is_intact(folder / CORRECT_FILE, record.correct_sha256):
        return None
    try:
        packed = storage.read_array(folder / CORRECT_FILE, (-(-images // 8),), "uint8")
    except storage.Corrupt:
        return None
    return np.unpackbits(packed, count=images).view(bool)


def write_history(folder: Path, history: Iterable[Mapping[str, object]]) -> None:
    storage.write_atomically(folder / HISTORY_FILE, csv_text(HISTORY_COLUMNS, history))
