"""Whether a file answers like PyTorch when a runtime serves it: asked once of every test image, and kept.

exported/<id>/checks/ARM.json says what was compared with what and how it came out, ARM.npy has the logits. Export asks
the runtime that each format is made for, the benchmark whatever else it is going to time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import Artifact
from export.parity import Parity
from harness import checkpoint, plugins, results


@dataclass(frozen=True)
class Check:
    """Of an artifact that a runtime serves on a device."""

    artifact: Artifact
    runtime: str
    device: str

    @property
    def name(self) -> str:
        """Of the arm: the runtime, and what sets the file apart from model.*."""
        stem = Path(self.runtime).stem if self.runtime.endswith(".py") else self.runtime
        return f"{stem}{self.artifact.path.stem.removeprefix('model').replace('_', ' ')}"

    @property
    def answers(self) -> Path:
        """Logits float32 [N, classes] of the test images, in their order."""
        return self._file.with_suffix(".npy")

    @property
    def _file(self) -> Path:
        return self.artifact.folder / "checks" / f"{self.name.replace(' ', '-')}-{self.device}.json"

    @property
    def of(self) -> dict[str, Any]:
        """All that its result depends on."""
        manifest = self.artifact.manifest
        return {
            "sha256": self.artifact.entry["sha256"],
            "reference": manifest["reference"]["sha256"],
            "fingerprint": manifest["fingerprint"],
            "runtime": checkpoint.sha256(plugins.source("export.runtimes", self.runtime)),
            "versions": results.environment()["versions"],
        }

    def kept(self) -> Mapping[str, Any] | None:
        """What `keep` returned, if it was asked the same."""
        try:
            found = checkpoint.read_json(self._file)
            same = found["of"] == self.of and found["answers_sha256"] == checkpoint.sha256(self.answers)
        except (OSError, ValueError, KeyError):
            return None
        return found if same else None

    def keep(self, parity: Parity, seconds: float) -> Mapping[str, Any]:
        """Record how the `answers`, which are there already and took so many seconds, came out."""
        found = {
            "of": self.of,
            "answers_sha256": checkpoint.sha256(self.answers),
            "parity": parity.to_json(),
            "images_per_second": parity.images / seconds,
        }
        checkpoint.write_json(self._file, found)
        return found
