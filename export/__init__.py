"""Exports the winner as files that other runtimes serve, and checks that their logits match PyTorch's."""

from dataclasses import dataclass
from pathlib import Path

from harness.run.manifest import FileEntry, Manifest

__all__ = ["SERVED_BY", "Artifact"]

# File format -> the runtime with which export checks it.
SERVED_BY = {"torch": "torch_eager", "onnx": "onnxruntime", "aoti": "aoti"}


@dataclass(frozen=True)
class Artifact:
    """One exported file: `name` in `folder`, described by the folder's manifest."""

    folder: Path
    manifest: Manifest
    name: str

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def entry(self) -> FileEntry:
        return self.manifest.files[self.name]

    @property
    def label(self) -> str:
        return f"{self.manifest.id}/{self.name}"
