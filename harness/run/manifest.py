"""manifest.json: the files of an export, the network and data they come from, and their parity with PyTorch."""

from math import nan
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from harness.run.storage import Json, JsonFile, Share


class Interval(JsonFile):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


class ParityRecord(JsonFile):
    """How a file's logits compare with PyTorch's in float64 (export/parity.py has the terms).

    `outcome`: passes, fails or too few images (empty in files of earlier versions)."""

    images: int = Field(ge=1)
    accuracy: Share
    torch_accuracy: Share
    top1_agreement: Share
    max_logit_difference: float
    disagreeing: list[int]
    lost: int = 0
    gained: int = 0
    accuracy_change: Interval = Field(default_factory=lambda: Interval(mean=nan, low=nan, high=nan, n=0))
    allowed_drop: float | None = None
    outcome: str = ""
    passed: bool


class FileInput(JsonFile):
    """Input of an exported file: normalised float32 images [N, 3, H, W], or uint8 images [N, H, W, 3]."""

    name: str = "images"
    dtype: Literal["float32", "uint8"] = "float32"
    shape: list[str | int] = Field(default_factory=list)
    normalized: bool = True


class FileEntry(JsonFile):
    """One exported file. `format`: torch, onnx or aoti."""

    format: str
    precision: str = "float32"
    sha256: str = ""
    bytes: int = 0
    input: FileInput = Field(default_factory=FileInput)
    opset: int | None = None
    parity: ParityRecord | None = None


class Digest(JsonFile):
    """SHA-256 of a file beside the manifest; further fields describe its content."""

    sha256: str


class Mistakes(Digest):
    """mistakes.npy; `images`: row of the test split, label, predicted class and probability of each image in it."""

    images: list[Json] = Field(default_factory=list)


class ExportTiming(JsonFile):
    export_seconds: dict[str, float] = Field(default_factory=dict)


class Manifest(JsonFile):
    """`config`, `settings`, `environment` and `normalization` have the format of the version that exported; `code`:
    digests of the network's files."""

    id: str
    config: Json
    weights_sha256: str | None
    code: dict[str, str] = Field(default_factory=dict)
    classes: list[str]
    normalization: Json = Field(default_factory=dict)
    input_size: int = Field(ge=1, le=4096)
    fingerprint: str = ""
    environment: Json = Field(default_factory=dict)
    settings: Json = Field(default_factory=dict)
    files: dict[str, FileEntry]
    absent: dict[str, str] = Field(default_factory=dict)
    timing: ExportTiming = Field(default_factory=ExportTiming)
    reference: Digest | None = None
    torch_accuracy: Share | None = None
    confusion: list[list[int]] = Field(default_factory=list)
    mistakes: Mistakes | None = None

    @field_validator("files")
    @classmethod
    def _names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if Path(name).name != name or name in ("", "..") or not name.isprintable():
                raise ValueError(f"{name!r} is no name of a file")
            if (files[name].format == "aoti") != name.endswith(".pt2"):
                raise ValueError(f"{name!r} has not the suffix of its format, {files[name].format}")
        return files

    def failed_parity(self) -> list[str]:
        """Names of float32 files whose logits differ from PyTorch's by more than parity allows."""
        return [
            name
            for name, entry in self.files.items()
            if entry.precision == "float32" and entry.parity is not None and not entry.parity.passed
        ]
