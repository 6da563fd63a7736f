"""python -m export run=DIR [key=value ...]: export the winner of a run and prove that it answers like the original.

Writes exported/<id>/: model.onnx (float32, normalised images [N, 3, H, W]), model_rewritten.onnx (the same in operators
that onnxruntime computes fast), both also as *_uint8.onnx (normalisation inside, uint8 [N, H, W, 3]), model.safetensors
(PyTorch), manifest.json (digests, classes, normalisation, parity).
What is there and whole is left as it is.
"""

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

from harness import cli
from harness.config import Data, Export, ExportConfig

if TYPE_CHECKING:
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
    from export.rewrite import rewrite
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
    made = {"onnx": ("", lambda model: model), "onnx_rewritten": ("_rewritten", rewrite)}
    takes = ["", "_uint8"] if settings.uint8 else [""]
    names = ["model.safetensors", *(f"model{made[kind][0]}{one}.onnx" for kind in settings.formats for one in takes)]
    if is_whole(folder, record, settings, names):
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
        "files": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # a manifest speaks of files that are there

    progress.status("exporting: PyTorch's answers on the test images")
    images, labels = data.test.images[data.test.rows], data.test.labels[data.test.rows]
    normalize = Normalizer(trial.normalization, torch.device("cpu"))
    normalized = normalize(torch.from_numpy(images)).numpy()
    with torch.inference_mode():
        channels_last = network.to(memory_format=torch.channels_last)
        reference = parity.predict_all(lambda batch: channels_last(torch.from_numpy(batch)).numpy(), normalized)

    manifest["torch_accuracy"] = float((reference.argmax(1) == labels).mean())
    manifest["confusion"] = parity.confusion(reference, labels).tolist()

    weights = folder / "model.safetensors"
    shutil.copyfile(run.trial_folder(record["id"]) / results.WEIGHTS, weights)
    float_input = {"name": "images", "dtype": "float32", "shape": ["batch", 3, side, side], "normalized": True}
    manifest["files"][weights.name] = _entry(weights, "torch", float_input)
    restored = restore(run.trial_folder(record["id"]), record, len(data.classes), side)  # in plain memory layout
    variants = {"": (restored, torch.from_numpy(normalized[:2].copy()), float_input, normalized)}
    if settings.uint8:
        uint8_input = {"name": "images", "dtype": "uint8", "shape": ["batch", side, side, 3], "normalized": False}
        with_normalization = onnx.FromUint8(restored, trial.normalization).eval()
        variants["_uint8"] = (with_normalization, torch.from_numpy(images[:2].copy()), uint8_input, images)
    for taken, (module, example, description, inputs) in variants.items():
        progress.status(f"exporting model{taken}.onnx")
        plain = onnx.to_onnx(module, example.contiguous(), settings.opset)
        for suffix, make in (made[kind] for kind in settings.formats):
            name = f"model{suffix}{taken}.onnx"
            onnx.save(make(plain), folder / name, settings.opset)
            entry = _entry(folder / name, "onnx", description) | {"opset": settings.opset}
            progress.status(f"checking {name} on {len(images):,} test images")
            predict = onnxruntime.load(Artifact(folder, manifest, name), "cpu", torch.get_num_threads())
            found = parity.compare(parity.predict_all(predict, inputs), reference, labels)
            manifest["files"][name] = entry | {"parity": found.to_json()}
            progress.line(
                f"export: {name}, accuracy {found.accuracy:.4f} (PyTorch {found.torch_accuracy:.4f}), top-1 agreement "
                f"{found.top1_agreement:.4%}, largest logit difference {found.max_logit_difference:.2e}"
            )
    checkpoint.write_json(folder / "manifest.json", manifest)
    wrong = [name for name, entry in manifest["files"].items() if not entry.get("parity", {"passed": True})["passed"]]
    if wrong:
        raise RuntimeError(f"{', '.join(wrong)}: does not answer like PyTorch; {folder / 'manifest.json'} has figures")


def _entry(path, kind: str, description: dict[str, Any]) -> dict[str, Any]:
    from harness import checkpoint

    return {
        "format": kind,
        "precision": "float32",
        "sha256": checkpoint.sha256(path),
        "bytes": path.stat().st_size,
        "input": description,
    }


def is_whole(folder, record, settings: Export, names: list[str]) -> bool:
    """Whether the folder holds these weights in every format, unchanged and passed."""
    from harness import checkpoint

    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = manifest["files"]
        return (
            manifest["weights_sha256"] == record["weights_sha256"]
            and all(checkpoint.sha256(folder / name) == files[name]["sha256"] for name in names)
            and all(files[name].get("opset", settings.opset) == settings.opset for name in names)
            and all(entry.get("parity", {"passed": True})["passed"] for entry in files.values())
        )
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    sys.exit(cli.run(ExportConfig, main, __doc__ or ""))
