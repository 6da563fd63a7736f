"""The winner as files that other runtimes serve, and the proof that they answer as PyTorch does."""

from dataclasses import dataclass
from pathlib import Path

from harness.run.manifest import FileEntry, Manifest

__all__ = ["SERVED_BY", "Artifact"]

# A file's format -> the runtime that it is made for, which export checks it with.
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
