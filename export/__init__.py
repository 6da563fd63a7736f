"""The winner as files that other runtimes serve, and the proof that they answer as PyTorch does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A file's format -> the runtime that it is made for, which export checks it with.
SERVED_BY = {"torch": "torch_eager", "onnx": "onnxruntime", "aoti": "aoti"}


@dataclass(frozen=True)
class Artifact:
    """One exported file: `name` in `folder`, described by the folder's manifest."""

    folder: Path
    manifest: Mapping[str, Any]
    name: str

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def entry(self) -> Mapping[str, Any]:
        return self.manifest["files"][self.name]

    @property
    def label(self) -> str:
        return f"{self.manifest['id']}/{self.name}"
