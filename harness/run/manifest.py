"""manifest.json: what an export consists of, which network and data it is of, and how its answers compare."""

from typing import Literal

from pydantic import Field

from harness.run.storage import Json, JsonFile


class Interval(JsonFile):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


class ParityRecord(JsonFile):
    """How a file's logits compare with PyTorch's in float64 (export/parity.py has the terms)."""

    images: int
    accuracy: float
    torch_accuracy: float
    top1_agreement: float
    max_logit_difference: float
    disagreeing: list[int]
    uncertain: list[int]
    lost: int = 0
    gained: int = 0
    accuracy_change: Interval
    mcnemar_p: float = 1.0
    allowed_drop: float | None = None
    passed: bool


class FileInput(JsonFile):
    """What a file takes: normalised float32 images [N, 3, H, W], or uint8 images [N, H, W, 3]."""

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
    """Of a file beside the manifest; more fields say what it holds."""

    sha256: str


class Mistakes(Digest):
    """mistakes.npy, and of each image in it: row of the test split, label, predicted class, probability."""

    images: list[Json] = Field(default_factory=list)


class ExportTiming(JsonFile):
    export_seconds: dict[str, float] = Field(default_factory=dict)


class Manifest(JsonFile):
    """`config`, `settings`, `environment` and `normalization` as the version that exported had them."""

    id: str
    config: Json
    weights_sha256: str | None
    classes: list[str]
    normalization: Json = Field(default_factory=dict)
    input_size: int
    fingerprint: str = ""
    environment: Json = Field(default_factory=dict)
    settings: Json = Field(default_factory=dict)
    files: dict[str, FileEntry]
    absent: dict[str, str] = Field(default_factory=dict)
    timing: ExportTiming = Field(default_factory=ExportTiming)
    reference: Digest | None = None
    torch_accuracy: float | None = None
    confusion: list[list[int]] = Field(default_factory=list)
    mistakes: Mistakes | None = None

    def failed_parity(self) -> list[str]:
        """Files in float32 that do not answer like PyTorch."""
        return [
            name
            for name, entry in self.files.items()
            if entry.precision == "float32" and entry.parity is not None and not entry.parity.passed
        ]
