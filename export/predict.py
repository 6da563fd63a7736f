"""python -m export.predict model=FILE image=FILE: classify images with an exported model.

Prints one line per image: file, class, probability. `model` is a file in exported/<id>/, whose manifest.json has the
classes and the normalisation. Several images: image=[FILE,FILE]. Images of another size are resized.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from export import SERVED_BY, Artifact
from harness.config import BadInput, Strict, command_line
from harness.run import storage
from harness.run.manifest import Manifest


class Predict(Strict):
    model: Path = Field(description="exported file: .onnx or .safetensors, with manifest.json beside it")
    image: list[Path] = Field(description="one image, or [FILE,FILE,...]", min_length=1)
    threads: int | None = Field(None, ge=1, description="CPU threads; default: one per usable core")

    @field_validator("image", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


def predict_images(config: Predict) -> int:
    manifest = read_manifest(config.model)
    missing = [path for path in config.image if not path.is_file()]
    if missing:
        raise BadInput(f"image={missing[0]}: no such file; give the path of an image")

    import numpy as np

    from harness.config import plugins
    from harness.data.decoding import read_images
    from harness.run import system

    artifact = Artifact(config.model.absolute().parent, manifest, config.model.name)
    if storage.sha256(artifact.path) != artifact.entry.sha256:
        raise BadInput(f"model={config.model}: its SHA-256 differs from manifest.json; export it again")
    side = manifest.input_size
    images = read_images(config.image, side, "image")
    if artifact.entry.input.normalized:
        normalization = manifest.normalization
        mean, std = (np.asarray(normalization[name], np.float32) for name in ("mean", "std"))
        images = np.ascontiguousarray(((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))
    runtime = SERVED_BY[artifact.entry.format]
    load = plugins.load("export.runtimes", runtime, "load")
    logits = load(artifact, "cpu", config.threads or system.environment().cores)(images).astype(np.float64)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    for path, row in zip(config.image, probabilities, strict=True):
        print(f"{path} {manifest.classes[row.argmax()]} {row.max():.4f}")
    return 0


def read_manifest(model: Path) -> Manifest:
    """The manifest beside an exported file. Raises BadInput where there is none or it does not list the file."""
    try:
        manifest = Manifest.read(model.parent / "manifest.json")
    except (OSError, ValueError) as error:
        raise BadInput(f"model={model}: no manifest.json beside it; give a file of a run's exported/<id>/") from error
    if model.name not in manifest.files or not model.is_file():
        known = ", ".join(manifest.files)
        raise BadInput(f"model={model}: no such exported file; choose one of {known}")
    return manifest


def main() -> int:
    return command_line.run_command(Predict, predict_images, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
