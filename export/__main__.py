"""python -m export run=DIR [key=value ...]: export the winner of a run and prove that it answers like the original.

Writes exported/<id>/: model.onnx (float32, normalised images [N, 3, H, W]), model_rewritten.onnx (the same in operators
that onnxruntime computes fast), model_int8.onnx (in eight bits where accuracy allows it), each also as *_uint8.onnx
(normalisation inside, uint8 [N, H, W, 3]), model.safetensors (PyTorch), manifest.json (digests, classes, normalisation,
parity).
What is there and whole is left as it is.
"""

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

from harness import cli
from harness.config import Data, Export, ExportConfig

if TYPE_CHECKING:
    import numpy as np

    from harness.datasets import Part
    from harness.progress import Progress
    from harness.results import RunDirectory


def main(config: ExportConfig) -> int:
    from harness.progress import Progress
    from harness.results import RunDirectory

    run = RunDirectory.existing(config.run)
    progress = Progress(run.path / "run.log")
    with run.locked(), progress.live():
        export_winner(run, config.export, progress)
    return 0


def export_winner(run: "RunDirectory", settings: Export, progress: "Progress") -> None:
    """Export the winning configuration's trial with the best validation; RuntimeError where parity fails."""
    from export import Artifact, onnx, parity
    from export.formats import CALIBRATION_IMAGES, FORMATS, Images, with_normalization
    from export.quantize import NotPossible
    from export.runtimes import onnxruntime
    from harness import checkpoint, datasets, results, stats
    from harness.config import Trial
    from harness.step import Normalizer
    from harness.trial import restore

    recorded = run.configuration()
    assert recorded is not None
    metric = recorded["config"]["search"]["metric"]
    ranked = stats.ranking(run.trials(), metric)
    if not ranked:
        raise RuntimeError("no trial has finished: nothing to export")
    record = stats.winning_trial(ranked[0], metric)
    folder = run.exported_folder(record["id"])
    if is_whole(folder, record, settings):
        progress.line(f"export: {folder.name} is there")
        return

    import torch

    data = datasets.load(Data.model_validate(recorded["config"]["data"]))
    trial = Trial.model_validate(record["config"])
    network = restore(run.trial_folder(record["id"]), record, len(data.classes), data.input_size)
    side = data.input_size
    manifest: dict[str, Any] = {
        "id": record["id"],
        "config": record["config"],
        "weights_sha256": record["weights_sha256"],
        "classes": list(data.classes),
        "normalization": trial.normalization.model_dump(mode="json"),
        "input_size": side,
        "fingerprint": data.fingerprint,
        "environment": results.environment(),
        "settings": settings.model_dump(mode="json"),
        "files": {},
        "absent": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # a manifest speaks of files that are there

    progress.status("exporting: PyTorch's answers on the test images")
    normalize = Normalizer(trial.normalization, torch.device("cpu"))

    def normalized(part: "Part", every: int = 1) -> "np.ndarray":
        return normalize(torch.from_numpy(part.images[part.rows[::every]])).numpy()

    def labels_of(part: "Part") -> "np.ndarray":
        return part.labels[part.rows]

    pixels, test, labels = data.test.images[data.test.rows], normalized(data.test), labels_of(data.test)
    with torch.inference_mode():
        channels_last = network.to(memory_format=torch.channels_last)
        reference = parity.predict_all(lambda batch: channels_last(torch.from_numpy(batch)).numpy(), test)

    manifest["torch_accuracy"] = float((reference.argmax(1) == labels).mean())
    manifest["confusion"] = parity.confusion(reference, labels).tolist()

    weights = folder / "model.safetensors"
    shutil.copyfile(run.trial_folder(record["id"]) / results.WEIGHTS, weights)
    float_input = {"name": "images", "dtype": "float32", "shape": ["batch", 3, side, side], "normalized": True}
    uint8_input = {"name": "images", "dtype": "uint8", "shape": ["batch", side, side, 3], "normalized": False}
    manifest["files"][weights.name] = _entry(weights, "torch", "float32", float_input)
    progress.status("exporting model.onnx")
    restored = restore(run.trial_folder(record["id"]), record, len(data.classes), side)  # in plain memory layout
    plain = onnx.to_onnx(restored, torch.from_numpy(test[:2].copy()), settings.opset)
    calibration = normalized(data.train, max(1, len(data.train) // CALIBRATION_IMAGES))
    images = Images(calibration, normalized(data.validation), labels_of(data.validation))
    for kind in settings.formats:
        made = FORMATS[kind]
        progress.status(f"exporting model{made.suffix}.onnx")
        try:
            model, extra = made.make(plain, images, settings)
        except NotPossible as reason:
            manifest["absent"][kind] = str(reason)
            progress.line(f"export: {kind} is absent: {reason}")
            continue
        for taken in ["", "_uint8"] if settings.uint8 else [""]:
            name = f"model{made.suffix}{taken}.onnx"
            onnx.save(with_normalization(model, trial.normalization) if taken else model, folder / name, settings.opset)
            entry = _entry(folder / name, "onnx", made.precision, uint8_input if taken else float_input)
            progress.status(f"checking {name} on {len(test):,} test images")
            predict = onnxruntime.load(Artifact(folder, manifest, name), "cpu", torch.get_num_threads())
            drop = None if made.exact else settings.max_accuracy_drop
            found = parity.compare(parity.predict_all(predict, pixels if taken else test), reference, labels, drop)
            manifest["files"][name] = entry | extra | {"opset": settings.opset, "parity": found.to_json()}
            progress.line(f"export: {name}, {found}")
    for old in folder.glob("model*.onnx"):  # of other settings: no manifest would speak of it
        if old.name not in manifest["files"]:
            old.unlink()
    checkpoint.write_json(folder / "manifest.json", manifest)
    if wrong := failed(manifest):
        raise RuntimeError(f"{', '.join(wrong)}: does not answer like PyTorch; {folder / 'manifest.json'} has figures")


def _entry(path, kind: str, precision: str, description: dict[str, Any]) -> dict[str, Any]:
    from harness import checkpoint

    return {
        "format": kind,
        "precision": precision,
        "sha256": checkpoint.sha256(path),
        "bytes": path.stat().st_size,
        "input": description,
    }


def failed(manifest: dict[str, Any]) -> list[str]:
    """Files in float32 that do not answer like PyTorch."""
    files = manifest["files"].items()
    return [
        name for name, f in files if f["precision"] == "float32" and not f.get("parity", {"passed": True})["passed"]
    ]


def is_whole(folder, record, settings: Export) -> bool:
    """Whether the folder holds what these settings make of these weights, unchanged, and exact where it must be."""
    from harness import checkpoint

    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return (
            manifest["weights_sha256"] == record["weights_sha256"]
            and manifest["settings"] == settings.model_dump(mode="json")
            and all(checkpoint.sha256(folder / name) == entry["sha256"] for name, entry in manifest["files"].items())
            and not failed(manifest)
        )
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    sys.exit(cli.run(ExportConfig, main, __doc__ or ""))
