"""python -m export.predict model=FILE image=FILE: classify images with an exported model.

Prints one line per image: file, class, probability. `model` is a file in exported/<id>/, whose manifest.json has the
classes and the normalisation. Several images: image=[FILE,FILE]. Images of another size are resized.
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from export import SERVED_BY, Artifact
from harness.config import BadInput, Normalization, Strict, command_line
from harness.config.errors import shown
from harness.config.keys import build_config
from harness.config.trial import MOST_SECONDS, MOST_THREADS
from harness.run import storage, trust
from harness.run.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MEMORY_BYTES = 4 << 30  # of the process that serves the model: room for a large network on a batch of images


class Predict(Strict):
    model: Path = Field(description="exported file: .onnx or .safetensors, with manifest.json beside it")
    image: list[Path] = Field(description="one image, or [FILE,FILE,...]", min_length=1)
    threads: int | None = Field(None, ge=1, le=MOST_THREADS, description="CPU threads; default: one per usable core")
    seconds: float = Field(15.0, gt=0, le=MOST_SECONDS, description="limit for loading the model, and for all answers")
    trust: bool = Field(False, description="run code that manifest.json names, and you have not; also a .pt2 file")

    @field_validator("image", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value


def predict_images(config: Predict) -> int:
    manifest = read_manifest(config.model)
    missing = [path for path in config.image if not path.is_file()]
    if missing:
        raise BadInput(f"image={missing[0]}: is no file; give the path of an image")
    artifact = Artifact(config.model.absolute().parent, manifest, config.model.name)
    if not storage.is_intact(artifact.path, artifact.entry.sha256):
        raise BadInput(f"model={config.model}: its SHA-256 differs from manifest.json; export it again")
    if artifact.entry.format not in SERVED_BY:
        raise BadInput(f"model={config.model}: its format is {artifact.entry.format}; another version exported it")
    for line in trust.check_exported(artifact.path, manifest, config.trust):
        print(line, file=sys.stderr)
    if artifact.entry.format == "torch":
        trust.check_manifest_code(config.model, manifest)

    import numpy as np

    from harness.data.decoding import read_images

    images = read_images(config.image, manifest.input_size, "image")
    if artifact.entry.input.normalized:
        normalization = build_config(Normalization, manifest.normalization, f"model={config.model}: normalization.")
        with np.errstate(all="ignore"):  # the logits are checked
            mean, std = (np.asarray(values, np.float32) for values in (normalization.mean, normalization.std))
            images = np.ascontiguousarray(((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))
    logits = _logits(artifact, images, config)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    for path, row in zip(config.image, probabilities, strict=True):
        print(f"{shown(path)} {shown(manifest.classes[row.argmax()])} {row.max():.4f}")
    return 0


def _logits(artifact: Artifact, images: "npt.NDArray[Any]", config: Predict) -> "npt.NDArray[np.float64]":
    """The logits of images, from another process with limits. Raises BadInput where the file gives none."""
    import numpy as np

    from export.check import Check
    from export.process import RuntimeProcess
    from export.runtimes import Unavailable
    from harness.run import system

    threads = config.threads or system.environment().cores
    check = Check(artifact, SERVED_BY[artifact.entry.format], "cpu")
    with tempfile.TemporaryDirectory() as folder:
        given, answers = Path(folder) / "images.npy", Path(folder) / "answers.npy"
        np.save(given, images)
        with RuntimeProcess(threads, memory_bytes=MEMORY_BYTES, seconds=config.seconds) as process:
            try:
                process.load(check, given)
                process.ask("answers", to=str(answers), batch_size=100)
            except (Unavailable, RuntimeError) as error:
                way_out = (
                    "export it again, or give more seconds" if "no answer within" in str(error) else "export it again"
                )
                raise BadInput(f"model={config.model}: it cannot be served: {error}; {way_out}") from error
        wanted = [len(images), len(artifact.manifest.classes)]
        try:
            found = np.load(answers, mmap_mode="r")
        except ValueError as error:  # objects, such as text
            raise BadInput(
                f"model={config.model}: it answers no numbers, not logits {wanted}; export it again"
            ) from error
        if list(found.shape) != wanted or found.dtype.kind != "f":
            kind = "" if found.dtype.kind == "f" else f"{found.dtype} "
            raise BadInput(
                f"model={config.model}: it answers {kind}{list(found.shape)}, not logits {wanted}; export it again"
            )
        logits: npt.NDArray[np.float64] = np.array(found, np.float64)
    if not np.isfinite(logits).all():
        raise BadInput(f"model={config.model}: its logits are not finite numbers; export it again")
    return logits


def read_manifest(model: Path) -> Manifest:
    """The manifest beside an exported file. Raises BadInput where there is none or it does not list the file."""
    try:
        manifest = Manifest.read(model.parent / "manifest.json")
    except BadInput as error:
        raise BadInput(f"model={model}: {error}") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"model={model}: no manifest.json beside it; give a file of a run's exported/<id>/") from error
    if len(manifest.classes) < 2:
        raise BadInput(f"model={model}: manifest.json has no two classes; export it again")
    if model.name not in manifest.files or not model.is_file():
        known = ", ".join(manifest.files)
        raise BadInput(f"model={model}: no such exported file; choose one of {known}")
    return manifest


def main() -> int:
    return command_line.run_command(Predict, predict_images, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
