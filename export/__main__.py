"""python -m export run=DIR [key=value ...]: export the winner of a run and prove that it answers like the original.

Writes exported/<id>/: model.onnx (float32, normalised images [N, 3, H, W]), model_rewritten.onnx (the same in operators
that onnxruntime computes fast), model_int8.onnx (in eight bits where accuracy allows it), each also as *_uint8.onnx
(normalisation inside, uint8 [N, H, W, 3]), model.safetensors (PyTorch), reference.npy (PyTorch's logits of the test
images in float64), mistakes.npy (images that it is most confidently wrong about), checks/ (those of each file),
manifest.json (digests, classes, normalisation, parity).
On request also model_fp16.onnx and model.pt2 (AOTInductor). What is there and whole is left as it is.
"""

import sys
import time
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
    progress.check_logged()
    return 0


def export_winner(run: "RunDirectory", settings: Export, progress: "Progress") -> None:
    """Export the winning configuration's trial with the best validation; RuntimeError where parity fails."""
    from export import SERVED_BY, Artifact, parity
    from export.check import Check
    from export.formats import CALIBRATION_IMAGES, FORMATS, NotPossible, Source
    from harness import checkpoint, datasets, plugins, results, stats
    from harness.batches import Normalizer
    from harness.config import Trial
    from harness.evaluation import restore

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
        "timing": {"export_seconds": {}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # a manifest speaks of files that are there

    normalize = Normalizer(trial.normalization, torch.device("cpu"))

    def normalized(part: "Part", every: int = 1) -> "np.ndarray":
        return normalize(torch.from_numpy(part.images[part.rows[::every]])).numpy()

    def labels_of(part: "Part") -> "np.ndarray":
        return part.labels[part.rows]

    pixels, test, labels = data.test.images[data.test.rows], normalized(data.test), labels_of(data.test)
    exact = network.double()  # rounds in places that no file can be blamed for; to be compared with
    with torch.inference_mode():
        reference = parity.predict_all(
            lambda batch: exact(torch.from_numpy(batch).double()).numpy(),
            test,
            progress.counter("exporting: PyTorch's answers in float64, images"),
        )
    checkpoint.write_array(folder / "reference.npy", reference)
    manifest["reference"] = {"precision": "float64", "sha256": checkpoint.sha256(folder / "reference.npy")}
    manifest["torch_accuracy"] = float((reference.argmax(1) == labels).mean())
    manifest["confusion"] = parity.confusion(reference, labels).tolist()
    confused = parity.confident_mistakes(reference, labels, data.classes)
    checkpoint.write_array(folder / "mistakes.npy", pixels[[one["row"] for one in confused]])
    manifest["mistakes"] = {"sha256": checkpoint.sha256(folder / "mistakes.npy"), "images": confused}

    weights = folder / "model.safetensors"
    checkpoint.write_atomically(weights, (run.trial_folder(record["id"]) / results.WEIGHTS).read_bytes())
    float_input = {"name": "images", "dtype": "float32", "shape": ["batch", 3, side, side], "normalized": True}
    uint8_input = {"name": "images", "dtype": "uint8", "shape": ["batch", side, side, 3], "normalized": False}
    manifest["files"][weights.name] = _entry(weights, "torch", "float32", float_input)
    source = Source(
        network=restore(run.trial_folder(record["id"]), record, len(data.classes), side),  # in plain memory layout
        example=torch.from_numpy(test[:2].copy()),
        calibration=normalized(data.train, max(1, len(data.train) // CALIBRATION_IMAGES)),
        validation=normalized(data.validation),
        labels=labels_of(data.validation),
        normalization=trial.normalization,
        settings=settings,
    )
    for kind in settings.formats:
        made = FORMATS[kind]
        progress.status(f"exporting {made.file()}")
        started = time.perf_counter()
        try:
            model, extra = made.make(source)
        except NotPossible as reason:
            manifest["absent"][kind] = str(reason)
            progress.line(f"export: {kind} is absent: {reason}")
            continue
        for uint8 in [False, True] if settings.uint8 else [False]:
            name = made.file(uint8)
            progress.status(f"exporting {name}")
            made.save(model, folder / name, source, uint8)
            manifest["timing"]["export_seconds"][name] = round(time.perf_counter() - started, 2)
            entry = _entry(folder / name, made.kind, made.precision, uint8_input if uint8 else float_input)
            manifest["files"][name] = entry | extra | ({"opset": settings.opset} if made.kind == "onnx" else {})
            artifact = Artifact(folder, manifest, name)
            check = Check(artifact, SERVED_BY[made.kind], "cpu")
            load = plugins.load("export.runtimes", check.runtime, "load")
            predict = load(artifact, "cpu", torch.get_num_threads())
            drop = None if made.exact else settings.max_accuracy_drop
            started = time.perf_counter()
            logits = parity.predict_all(
                predict, pixels if uint8 else test, progress.counter(f"checking {name}, test images")
            )
            found = parity.compare(logits, reference, labels, drop)
            checkpoint.write_array(check.answers, logits)
            check.keep(found, time.perf_counter() - started)
            manifest["files"][name]["parity"] = found.to_json()
            progress.line(f"export: {name}, {found}")
            started = time.perf_counter()
    for old in (*folder.glob("model*.onnx"), *folder.glob("model*.pt2")):
        if old.name not in manifest["files"]:  # of other settings: no manifest would speak of it
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
        manifest = checkpoint.read_json(folder / "manifest.json")
        return (
            manifest["weights_sha256"] == record["weights_sha256"]
            and manifest["settings"] == settings.model_dump(mode="json")
            and all(checkpoint.is_whole(folder / name, entry["sha256"]) for name, entry in manifest["files"].items())
            and checkpoint.is_whole(folder / "reference.npy", manifest["reference"]["sha256"])
            and checkpoint.is_whole(folder / "mistakes.npy", manifest["mistakes"]["sha256"])
            and not failed(manifest)
        )
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    sys.exit(cli.run(ExportConfig, main, __doc__ or ""))
