"""Parity checks: a file's logits in a runtime against PyTorch's, compared once on every test image and stored.

exported/<id>/checks/ARM.json records what was compared and the result, ARM.npy the logits. Export checks each file in
the runtime that its format is made for; the benchmark checks every other arm that it times.
"""

from dataclasses import dataclass
from pathlib import Path

from export import Artifact
from export.parity import Parity
from harness.config import plugins
from harness.run import storage, system
from harness.run.manifest import ParityRecord
from harness.run.provenance import network_files
from harness.run.storage import Json, JsonFile


@dataclass(frozen=True)
class Check:
    """The parity check of an artifact that a runtime serves on a device."""

    artifact: Artifact
    runtime: str
    device: str

    @property
    def name(self) -> str:
        """Name of the arm: the runtime, then what distinguishes the file's name from model.*."""
        stem = Path(self.runtime).stem if self.runtime.endswith(".py") else self.runtime
        return f"{stem}{self.artifact.path.stem.removeprefix('model').replace('_', ' ')}"

    @property
    def answers(self) -> Path:
        """The .npy file of the logits, float32 [N, classes], of the test images in order."""
        return self._file.with_suffix(".npy")

    @property
    def _file(self) -> Path:
        return self.artifact.folder / "checks" / f"{self.name.replace(' ', '-')}-{self.device}.json"

    @property
    def depends_on(self) -> Json:
        """Everything that the result depends on."""
        manifest = self.artifact.manifest
        assert manifest.reference is not None
        return {
            "sha256": self.artifact.entry.sha256,
            "reference": manifest.reference.sha256,
            "fingerprint": manifest.fingerprint,
            "code": network_files(manifest.config["architecture"]) if self.artifact.entry.format == "torch" else {},
            "runtime": storage.sha256(plugins.source("export.runtimes", self.runtime)),
            "versions": system.environment().versions,
        }

    def stored(self) -> "CheckRecord | None":
        """The record that `store` wrote; None if there is none or anything that it depends on has changed."""
        try:
            found = CheckRecord.read(self._file)
            same = found.of == self.depends_on and found.answers_sha256 == storage.sha256(self.answers)
        except (OSError, ValueError):
            return None
        return found if same else None

    def store(self, parity: Parity, seconds: float) -> "CheckRecord":
        """Write the result; the logits are in `answers` already, and took `seconds` to compute."""
        found = CheckRecord(
            of=self.depends_on,
            answers_sha256=storage.sha256(self.answers),
            parity=parity.record(),
            images_per_second=parity.images / seconds,
        )
        found.write(self._file)
        return found


class CheckRecord(JsonFile):
    """Contents of checks/ARM.json."""

    of: Json
    answers_sha256: str
    parity: ParityRecord
    images_per_second: float
