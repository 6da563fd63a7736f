"""The inference benchmark: every runtime that serves the exported float32 model, over batch sizes.

Accuracy comes before speed: what did not answer like PyTorch at export is not timed. Inputs are real test images that
rotate from call to call. The reference runs twice, under two names; the ratio of the two is the noise of this sitting.
"""

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas

from benchmarks import timing
from export import Artifact
from export.runtimes import Predict, Unavailable
from harness import plugins, results, stats
from harness.config import Benchmark, Data, Normalization
from harness.errors import BadInput

if TYPE_CHECKING:
    from pathlib import Path

    from harness.progress import Progress

REFERENCE = "torch_eager"
AGAIN = "torch_eager_again"
COLUMNS = (
    "artifact backend precision device batch_size threads scope replicate round images seconds".split()  # noqa: SIM905
)
IMAGES = 1024  # rotate through so many test images


@dataclass(frozen=True)
class Arm:
    """One runtime serving one file on one device; `predict` is None where it cannot, and `note` says why.

    `backend`: the runtime's name, and what sets the file apart from model.onnx.
    """

    backend: str
    device: str
    artifact: Artifact
    predict: Predict | None
    note: str = ""


def pick_arms(artifacts: list[Artifact], settings: Benchmark, threads: int, progress: "Progress") -> list[Arm]:
    """Each runtime with each file of its format that takes normalised float32 images and has passed parity.

    On a machine with a GPU, a runtime that cannot use it is listed as absent there and measured on the CPU instead.
    """
    import torch

    cuda = settings.device != "cpu" and torch.cuda.is_available()
    arms = []
    for backend in dict.fromkeys([REFERENCE, *(settings.runtimes or plugins.names("export.runtimes"))]):
        kind = plugins.load("export.runtimes", backend, "FORMAT")
        load = plugins.load("export.runtimes", backend, "load")
        for artifact in artifacts:
            entry, name = artifact.entry, f"{backend}{artifact.path.stem.removeprefix('model').replace('_', ' ')}"
            if entry["format"] != kind or not entry["input"]["normalized"]:
                continue
            if not entry.get("parity", {"passed": True})["passed"]:
                arms.append(Arm(name, "cpu", artifact, None, "does not answer as it must: not timed"))
                continue
            for device in ["cuda", "cpu"] if cuda else ["cpu"]:
                try:
                    progress.status(f"benchmark: loading {name} on {device}")
                    arms.append(Arm(name, device, artifact, load(artifact, device, threads)))
                    break
                except Unavailable as reason:
                    arms.append(Arm(name, device, artifact, None, str(reason)))
                    progress.line(f"benchmark: {name} on {device} is absent: {reason}")
    return arms


def measure(arms: list[Arm], images: np.ndarray, settings: Benchmark, threads: int, progress: "Progress"):
    """Rows of inference.csv; `images` float32 [N, 3, H, W], N at least the largest batch."""
    rows: list[dict[str, Any]] = []
    present = {arm.backend: arm for arm in arms if arm.predict is not None}
    for position, batch_size in enumerate(settings.batch_sizes):
        progress.status(f"benchmark: batch size {batch_size} ({position + 1} of {len(settings.batch_sizes)})")
        starts = range(0, len(images) - batch_size + 1, batch_size)
        batches = [np.ascontiguousarray(images[i : i + batch_size]) for i in starts]
        calls = {}
        for name in [*present, AGAIN]:
            predict, rotation = present[REFERENCE if name == AGAIN else name].predict, itertools.cycle(batches)
            calls[name] = lambda predict=predict, rotation=rotation: predict(next(rotation))
        for one in timing.interleave(calls, settings.rounds, settings.round_seconds, seed=batch_size):
            arm = present[REFERENCE if one.arm == AGAIN else one.arm]
            rows.append(
                {
                    "artifact": arm.artifact.label,
                    "backend": one.arm,
                    "precision": arm.artifact.entry["precision"],
                    "device": arm.device,
                    "batch_size": batch_size,
                    "threads": threads,
                    "scope": "host arrays",
                    "replicate": 0,
                    "round": one.round,
                    "images": one.calls * batch_size,
                    "seconds": one.seconds,
                }
            )
    return rows


def summarize(rows: list[dict[str, Any]], arms: list[Arm]) -> pandas.DataFrame:
    """One row a backend and batch size: median images/s and latency, ratio to the reference with its 95 % interval."""
    table = pandas.DataFrame(rows)
    table["images_per_second"] = table["images"] / table["seconds"]
    summary = []
    order = [REFERENCE, AGAIN, *dict.fromkeys(arm.backend for arm in arms if arm.backend != REFERENCE)]
    table = table.sort_values("backend", key=lambda names: names.map(order.index), kind="stable")
    table = table.sort_values(["batch_size", "round"], kind="stable")
    for (batch_size, backend), own in table.groupby(["batch_size", "backend"], sort=False):
        reference = table[(table.batch_size == batch_size) & (table.backend == REFERENCE)]
        ratio = stats.ratio_interval(own["images_per_second"].tolist(), reference["images_per_second"].tolist())
        speed = float(own["images_per_second"].median())
        summary.append(
            {
                **{name: own[name].iloc[0] for name in ("artifact", "backend", "precision", "device", "batch_size")},
                "images_per_second": speed,
                "latency_ms": 1000 * float(batch_size) / speed,  # type: ignore[arg-type]
                "ratio": ratio.mean,
                "ratio_low": ratio.low if backend != REFERENCE else 1.0,
                "ratio_high": ratio.high if backend != REFERENCE else 1.0,
                "rounds": len(own),
                "note": "the reference again: the noise of this sitting" if backend == AGAIN else "",
            }
        )
    for arm in arms:
        if arm.predict is None:
            summary.append(
                {"artifact": arm.artifact.label, "backend": arm.backend, "device": arm.device, "note": arm.note}
            )
    return pandas.DataFrame(summary)


def benchmark_exported(run: results.RunDirectory, settings: Benchmark, progress: "Progress") -> None:
    """Measure the exported models of a run; writes inference.csv and inference_summary.csv."""
    import torch

    from harness import checkpoint, datasets
    from harness.step import Normalizer

    manifests = [json.loads(path.read_text()) for path in sorted((run.path / "exported").glob("*/manifest.json"))]
    if not manifests:
        raise RuntimeError("nothing is exported; run the export stage first")
    recorded = run.configuration()
    assert recorded is not None
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if settings.device == "cuda" and cuda is None:
        raise BadInput("benchmark.device=cuda: PyTorch sees no CUDA device; use auto or cpu")
    threads = settings.threads or results.environment()["cores"]
    request = {
        "settings": settings.model_dump(mode="json"),
        "threads": threads,
        "machine": {name: results.environment()[name] for name in ("host", "cpu", "versions")} | {"cuda": cuda},
        "files": {m["id"]: {name: entry["sha256"] for name, entry in m["files"].items()} for m in manifests},
    }
    digest_file = run.path / "exported" / "benchmarked.json"
    if _same(digest_file, request) and (run.path / "inference.csv").is_file():
        progress.line("benchmark: is there")
        return
    data = datasets.load(Data.model_validate(recorded["config"]["data"]))
    chosen = data.test.rows[: max(IMAGES, *settings.batch_sizes)]
    chosen = np.resize(chosen, max(len(chosen), *settings.batch_sizes))  # few test images: they repeat
    rows, summaries = [], []
    for manifest in manifests:  # one model at a time: ratios compare runtimes, not models
        folder = run.exported_folder(manifest["id"])
        normalize = Normalizer(
            Normalization.model_validate(manifest["normalization"]), torch.device("cpu"), "contiguous"
        )
        images = normalize(torch.from_numpy(data.test.images[chosen])).numpy()
        arms = pick_arms([Artifact(folder, manifest, name) for name in manifest["files"]], settings, threads, progress)
        own = measure(arms, images, settings, threads, progress)
        summaries.append(summarize(own, arms))
        rows += own
    summary = pandas.concat(summaries, ignore_index=True)
    checkpoint.write_atomically(run.path / "inference.csv", results.csv_text(COLUMNS, rows))
    checkpoint.write_atomically(run.path / "inference_summary.csv", summary.to_csv(index=False))
    checkpoint.write_json(digest_file, request)
    for row in summary.dropna(subset=["ratio"]).to_dict("records"):  # absent runtimes have none
        progress.line(
            f"benchmark: batch {row['batch_size']:g}, {row['backend']} on {row['device']}: "
            f"{row['images_per_second']:,.0f} images/s, {row['ratio']:.2f} [{row['ratio_low']:.2f}, "
            f"{row['ratio_high']:.2f}] times {REFERENCE}"
        )


def _same(path: "Path", request: dict[str, Any]) -> bool:
    try:
        return json.loads(path.read_text()) == request
    except (OSError, ValueError):
        return False
