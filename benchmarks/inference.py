"""The inference benchmark: which file, in which runtime, answers how fast, and which of them to ship.

An arm is a file that a runtime serves. Accuracy comes before speed: an arm that does not answer as it must on every
test image is shown and not timed. How it is timed: benchmarks/sitting.py; what comes of it: benchmarks/verdict.py.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import conditions, verdict
from benchmarks.sitting import AGAIN, REFERENCE, Arm, Sitting, Worker
from export import Artifact
from export.check import Check
from export.parity import compare
from export.runtimes import Unavailable
from harness import checkpoint, plugins, results, stats
from harness.config import Benchmark, Data, Normalization
from harness.errors import BadInput

if TYPE_CHECKING:
    from harness.progress import Progress

DEFAULT = (REFERENCE, "onnxruntime")
COLUMNS = (
    *("artifact", "backend", "precision", "device", "batch_size", "threads", "scope", "replicate", "round"),
    *("images", "seconds", "call_ms", "event_ms", "foreign_cores", "note"),
)
CHECK_BATCH = 500
ROWS = "inference.csv"


def candidates(artifacts: Sequence[Artifact], settings: Benchmark, cuda: bool) -> Iterator[Arm]:
    """Each runtime with each file of its format that takes what is timed: normalised float32 images, or uint8 ones.

    PyTorch's own file takes no uint8 images: the worker normalises them where they are. With a GPU each is tried there,
    and on the CPU where it cannot use it.
    """
    default = plugins.names("export.runtimes") if settings.full else DEFAULT
    for runtime in dict.fromkeys([REFERENCE, *(settings.runtimes or default)]):
        kind = plugins.load("export.runtimes", runtime, "FORMAT")
        own = plugins.load("export.runtimes", runtime, "PRECISION", None)
        for artifact in artifacts:
            entry = artifact.entry
            takes = entry["input"]["normalized"] != settings.uint8 or kind == "torch"
            if entry["format"] == kind and takes:
                check = Check(artifact, runtime, "cuda" if cuda else "cpu")
                yield Arm(check.name, check, own or entry["precision"])


def checked(
    arm: Arm, reference: np.ndarray, labels: np.ndarray, images: Path, threads: int, allowed: float, log: Path
) -> None:
    """Compare the arm with PyTorch in float64 on every test image, unless that was done; fills in what came out."""
    artifact = arm.check.artifact
    found = conditions.found_precision(artifact.path)
    if found is not None and found != artifact.entry["precision"]:
        arm.note = f"the manifest says {artifact.entry['precision']}, the file holds {found}: not timed"
        return
    try:
        kept = arm.check.kept()
        if kept is None:
            with (
                Worker(arm, threads, images, log) as worker,
                tempfile.NamedTemporaryFile(suffix=".npy") as file,
            ):
                told = worker.ask("answers", to=file.name, batch_size=CHECK_BATCH)
                logits = np.load(file.name)
            from harness import checkpoint

            checkpoint.write_array(arm.check.answers, logits)
            drop = None if arm.precision == "float32" else allowed
            kept = arm.check.keep(compare(logits, reference, labels, drop), told["seconds"])
    except (Unavailable, RuntimeError) as reason:
        arm.note = str(reason)
        return
    arm.accuracy, arm.images_per_second = kept["parity"], kept["images_per_second"]
    lost = -arm.accuracy["accuracy_change"]["low"]
    if not arm.accuracy["passed"] and (arm.precision == "float32" or not lost <= allowed):
        arm.note = "does not answer as it must: not timed"


def benchmark_exported(run: results.RunDirectory, settings: Benchmark, progress: "Progress") -> None:
    """Measure the exported models of a run; writes inference.csv, inference_summary.csv and verdict.json."""
    import torch

    from harness import datasets
    from harness.batches import Normalizer

    conditions.check_no_debugging()
    recorded = run.configuration()
    assert recorded is not None
    ranked = stats.ranking(run.trials(), recorded["config"]["search"]["metric"])
    winner = stats.winning_trial(ranked[0], recorded["config"]["search"]["metric"])["id"] if ranked else ""
    folder = run.exported_folder(winner)
    if not (folder / "manifest.json").is_file():
        raise RuntimeError("the winner is not exported; run the export stage first")
    manifest = checkpoint.read_json(folder / "manifest.json")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if settings.device == "cuda" and cuda is None:
        raise BadInput("benchmark.device=cuda: PyTorch sees no CUDA device; use auto or cpu")
    if "device" in settings.scopes and (cuda is None or settings.device == "cpu"):
        raise BadInput(f"benchmark.scope={settings.scope}: is for a GPU; on a CPU arrays are on the host, use host")
    if settings.uint8 and all(entry["input"]["normalized"] for entry in manifest["files"].values()):
        raise BadInput("benchmark.uint8=true: no exported file takes uint8 images; export with export.uint8=true")
    threads = settings.threads or results.environment()["cores"]
    request = {
        "settings": settings.model_dump(mode="json"),
        "threads": threads,
        "machine": {name: results.environment()[name] for name in ("host", "cpu", "versions")} | {"cuda": cuda},
        "files": {name: entry["sha256"] for name, entry in manifest["files"].items()},
    }
    state_file = run.path / results.BENCHMARKED
    state = _state(state_file, request, run)
    if "files" in state and all(run.is_benchmark_whole(name) for name in state["files"]):
        progress.line("benchmark: is there")
        return

    data = datasets.load(Data.model_validate(recorded["config"]["data"]))
    labels = data.test.labels[data.test.rows]
    normalize = Normalizer(Normalization.model_validate(manifest["normalization"]), torch.device("cpu"), "contiguous")
    reference = np.load(folder / "reference.npy")
    log = run.path / "exported" / "benchmark.log"
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images.npy"
        pixels = data.test.images[data.test.rows]
        np.save(images, pixels if settings.uint8 else normalize(torch.from_numpy(pixels)).numpy())
        arms = []
        artifacts = [Artifact(folder, manifest, name) for name in manifest["files"]]
        for arm in candidates(artifacts, settings, bool(cuda) and settings.device != "cpu"):
            progress.status(f"benchmark: checking {arm.name} on {len(labels):,} test images")
            checked(arm, reference, labels, images, threads, settings.max_accuracy_drop, log)
            arms.append(arm)
            if arm.note and arm.check.device == "cuda":  # then on the CPU
                arm = Arm(arm.name, Check(arm.check.artifact, arm.check.runtime, "cpu"), arm.precision)
                checked(arm, reference, labels, images, threads, settings.max_accuracy_drop, log)
                arms.append(arm)
        for arm in arms:
            if arm.note:
                progress.line(f"benchmark: {arm.name} on {arm.check.device} is absent: {arm.note}")
        timed = [arm for arm in arms if not arm.note]
        if not timed or timed[0].name != REFERENCE:
            raise RuntimeError(f"the reference {REFERENCE} cannot be measured: {arms[0].note}")
        sitting = Sitting(timed, images, float(np.abs(reference).max()), settings, threads, log)
        todo = range(state["replicates"], settings.replicates)
        each = sitting.estimated_seconds()
        from harness.progress import duration

        progress.line(
            f"benchmark: {len(timed)} arms x batch sizes {settings.batch_sizes}, {len(todo)} replicates to measure, "
            f"about {duration(len(todo) * each)}"
        )
        started = time.monotonic()
        for done, number in enumerate(todo, 1):
            rows, cold, profiled = sitting.replicate(number, progress)
            state = {**state, "replicates": number + 1, "cold": state["cold"] + cold}
            state["operators"] += profiled
            rows = _rows(run) + rows if number else rows
            checkpoint.write_atomically(run.path / ROWS, results.csv_text(COLUMNS, rows))
            state["rows_sha256"] = checkpoint.sha256(run.path / ROWS)
            checkpoint.write_json(state_file, state)
            left = (time.monotonic() - started) / done * (len(todo) - done)
            progress.line(f"benchmark: replicate {number + 1} of {settings.replicates} done, {duration(left)} left")
    written = [ROWS, "inference_summary.csv", "verdict.json"]
    summary = verdict.summarize(_rows(run), state["cold"], arms, REFERENCE, AGAIN)
    checkpoint.write_atomically(run.path / "inference_summary.csv", summary.to_csv(index=False))
    if profiled := state["operators"]:
        text = results.csv_text(profiled[0], profiled)
        checkpoint.write_atomically(run.path / "inference_operators.csv", text)
        written.append("inference_operators.csv")
    told = verdict.decide(summary, settings, REFERENCE, AGAIN)
    checkpoint.write_json(run.path / "verdict.json", told | {"environment": results.environment()})
    checkpoint.write_json(state_file, {**state, "files": {n: checkpoint.sha256(run.path / n) for n in written}})
    for line in verdict.lines(summary, told, REFERENCE, AGAIN):
        progress.line(f"benchmark: {line}")


def _state(path: Path, request: dict[str, Any], run: results.RunDirectory) -> dict[str, Any]:
    """What an interrupted benchmark of the same request has done."""
    try:
        found = checkpoint.read_json(path)
        if found["request"] == request and checkpoint.is_whole(run.path / ROWS, found["rows_sha256"]):
            return found
    except (OSError, ValueError, KeyError):
        pass
    return {"request": request, "replicates": 0, "cold": [], "operators": []}


def _rows(run: results.RunDirectory) -> list[dict[str, Any]]:
    """Of inference.csv."""
    import pandas

    texts = {"call_ms": str, "event_ms": str, "note": str}
    table = pandas.read_csv(run.path / ROWS, dtype=texts, keep_default_na=False)
    return table.to_dict("records")  # type: ignore[return-value]
