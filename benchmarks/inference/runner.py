"""The inference benchmark: how fast each exported file is in each runtime, and which arm to ship.

An arm is a file that a runtime serves. Accuracy comes before speed: an arm whose logits of the test images fail their
check is listed but not timed. sitting.py times the arms, summary.py computes ratios from that, verdict.py recommends.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from benchmarks.inference import conditions, summary, verdict
from benchmarks.inference.sitting import AGAIN, REFERENCE, Arm, ArmProcess, Sitting
from export import Artifact
from export.check import Check
from export.parity import compare_logits
from export.runtimes import Unavailable
from harness.config import BadInput, Benchmark, Normalization, plugins
from harness.config.errors import NotYet
from harness.data.batches import Normalizer
from harness.data.dataset import load_dataset
from harness.run import storage, system
from harness.run.chance import is_chance
from harness.run.directory import BENCHMARKED, RunDirectory
from harness.run.manifest import Manifest
from harness.run.progress import Progress, duration
from harness.run.recommendation import Recommendation
from harness.run.storage import Json, JsonFile
from harness.run.tables import csv_text
from harness.stats.accuracy import Gate
from harness.stats.ranking import rank, winning_trial
from harness.stats.sequential import REPLICATES, Look, looks_of

if TYPE_CHECKING:
    import pandas as pd

DEFAULT = (REFERENCE, "onnxruntime")
COLUMNS = (
    *("artifact", "backend", "precision", "device", "batch_size", "threads", "scope", "replicate", "round"),
    *("images", "seconds", "call_ms", "event_ms", "foreign_cores", "note"),
)
CHECK_BATCH = 500
ROWS = "inference.csv"


class BenchmarkState(JsonFile):
    """benchmarked.json: progress of the benchmark of a request; `files`: digests of its files, once it has ended."""

    request: Json
    replicates: int = 0
    cold: list[Json] = Field(default_factory=list)
    operators: list[Json] = Field(default_factory=list)
    rows_sha256: str = ""
    files: dict[str, str] = Field(default_factory=dict)


def benchmark_exported(run: RunDirectory, settings: Benchmark, progress: Progress) -> None:
    """Measure the exported models of a run; writes inference.csv, inference_summary.csv and verdict.json.

    Raises BadInput where the settings cannot be measured here, NotYet where the winner is not exported, RuntimeError
    where the reference itself cannot be measured. An interrupted benchmark resumes after its last complete replicate.
    """
    conditions.check_no_debugging()
    recorded = run.recorded()
    ranked = rank(run.trials(), recorded.metric)
    folder = run.exported_folder(winning_trial(ranked[0], recorded.metric).id if ranked else "")
    if not (folder / "manifest.json").is_file():
        raise NotYet(f"run={run.path}: the winner is not exported; run `python -m export` first")
    manifest = Manifest.read(folder / "manifest.json")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    check_possible(settings, manifest, cuda)
    threads = settings.threads or system.environment().cores
    request = {
        "settings": settings.model_dump(mode="json"),
        "threads": threads,
        "machine": system.environment().model_dump(include={"host", "cpu", "versions"}) | {"cuda": cuda},
        "files": {name: entry.sha256 for name, entry in manifest.files.items()},
    }
    state = _state(run, request)
    if state.files and all(run.is_benchmark_intact(name) for name in state.files):
        progress.line("benchmark: is already complete")
        return

    data = load_dataset(recorded.data_config)
    labels, pixels = data.test.labels[data.test.rows], data.test.images[data.test.rows]
    normalize = Normalizer(Normalization.model_validate(manifest.normalization), torch.device("cpu"), "contiguous")
    reference = _reference(folder, manifest, (len(labels), len(data.classes)))
    log = run.path / "exported" / "benchmark.log"
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images.npy"
        np.save(images, pixels if settings.uint8 else normalize(torch.from_numpy(pixels)).numpy())
        artifacts = [Artifact(folder, manifest, name) for name in manifest.files]
        checker = ArmChecker(reference, labels, images, threads, settings.max_accuracy_drop, log)
        arms = checker.checked(candidate_arms(artifacts, settings, bool(cuda) and settings.device != "cpu"), progress)
        timed = [arm for arm in arms if not arm.note]
        if not timed or timed[0].name != REFERENCE:
            raise RuntimeError(f"the reference {REFERENCE} cannot be measured: {arms[0].note}")
        sitting = Sitting(timed, images, float(np.abs(reference).max()), settings, threads, log)
        for look in looks_of(settings.replicates, REPLICATES):
            _measure(sitting, look.number or int(settings.replicates), state, run, progress)
            table, recommended = _judge(arms, settings, state, run, look)
            accuracy = 1.0 if manifest.torch_accuracy is None else manifest.torch_accuracy
            if is_chance(accuracy, float(np.bincount(labels).max() / len(labels)), len(labels)):
                recommended.ship, recommended.tied = None, []
                recommended.sentence = "nothing is recommended: the network answers no better than chance"
            if settings.replicates == "auto":
                known = "settled" if recommended.settled else "not settled"
                progress.line(f"benchmark: {known} after {look.number} replicates which arms are fastest")
            if recommended.settled:
                break
    _conclude(table, recommended, state, run, progress)


def check_possible(settings: Benchmark, manifest: Manifest, cuda: str | None) -> None:
    """Raises BadInput where this machine or the export lacks what the settings need; `cuda`: name of the GPU."""
    if settings.device == "cuda" and cuda is None:
        raise BadInput("benchmark.device=cuda: PyTorch sees no CUDA device; use auto or cpu")
    if "device" in settings.scopes and (cuda is None or settings.device == "cpu"):
        raise BadInput(f"benchmark.scope={settings.scope}: needs a GPU; use benchmark.scope=host")
    if settings.uint8 and all(entry.input.normalized for entry in manifest.files.values()):
        raise BadInput("benchmark.uint8=true: no exported file takes uint8 images; export with export.uint8=true")


def _reference(folder: Path, manifest: Manifest, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """PyTorch's logits of the test images. Raises NotYet where they are not those of the manifest."""
    file = folder / "reference.npy"
    try:
        if not manifest.reference or not storage.is_intact(file, manifest.reference.sha256):
            raise storage.Corrupt(f"{file}: is corrupt")
        return storage.read_array(file, shape, "float64")
    except storage.Corrupt as error:
        raise NotYet(f"model={error}; run `python -m export` again") from error


def candidate_arms(artifacts: Sequence[Artifact], settings: Benchmark, cuda: bool) -> Iterator[Arm]:
    """Each runtime with each file of its format that takes the timed input: normalised float32 images, or uint8 images.

    PyTorch's own file takes no uint8 images: the server process normalises them on their device. With a GPU each arm is
    tried there first, and on the CPU if it cannot use the GPU.
    """
    default = plugins.names("export.runtimes") if settings.full else DEFAULT
    for runtime in dict.fromkeys([REFERENCE, *(settings.runtimes or default)]):
        kind = plugins.load("export.runtimes", runtime, "FORMAT")
        own = plugins.load("export.runtimes", runtime, "PRECISION", None)
        for artifact in artifacts:
            entry = artifact.entry
            takes = entry.input.normalized != settings.uint8 or kind == "torch"
            if entry.format == kind and takes:
                check = Check(artifact, runtime, "cuda" if cuda else "cpu")
                yield Arm(check.name, check, own or entry.precision)


class ArmChecker:
    """Compares arms with PyTorch in float64 (`reference` [N, classes]) on every test image."""

    def __init__(
        self,
        reference: npt.NDArray[np.float64],
        labels: npt.NDArray[np.int64],
        images: Path,
        threads: int,
        allowed: float,
        log: Path,
    ):
        self.reference, self.labels, self.images = reference, labels, images
        self.threads, self.allowed, self.log = threads, allowed, log

    def checked(self, candidates: Iterator[Arm], progress: Progress) -> list[Arm]:
        """Check all arms; the `note` of an arm that is not to be timed says why."""
        arms: list[Arm] = []
        for arm in candidates:
            progress.status(f"benchmark: checking {arm.name} on {len(self.labels):,} test images")
            self.check(arm)
            arms.append(arm)
            if arm.note and arm.check.device == "cuda":  # try the CPU instead
                arm = Arm(arm.name, Check(arm.check.artifact, arm.check.runtime, "cpu"), arm.precision)
                self.check(arm)
                arms.append(arm)
        for arm in arms:
            if arm.note:
                progress.line(f"benchmark: {arm.name} on {arm.check.device} is absent: {arm.note}")
        return arms

    def check(self, arm: Arm) -> None:
        """Check the arm, unless a stored check is still valid; sets its accuracy, or its note."""
        artifact = arm.check.artifact
        found = conditions.found_precision(artifact.path)
        if found is not None and found != artifact.entry.precision:
            arm.note = f"the manifest says {artifact.entry.precision}, the file holds {found}: not timed"
            return
        try:
            stored = arm.check.stored()
            if stored is None:
                with (
                    ArmProcess(arm, self.threads, self.images, self.log) as process,
                    tempfile.NamedTemporaryFile(suffix=".npy") as file,
                ):
                    answered = process.ask("answers", to=file.name, batch_size=CHECK_BATCH)
                    logits = np.load(file.name)
                storage.write_array(arm.check.answers, logits)
                drop = None if arm.precision == "float32" else self.allowed
                stored = arm.check.store(compare_logits(logits, self.reference, self.labels, drop), answered["seconds"])
        except (Unavailable, RuntimeError) as reason:
            arm.note = str(reason)
            return
        arm.accuracy, arm.images_per_second = stored.parity, stored.images_per_second
        parity = arm.accuracy
        failed = not parity.passed
        if arm.precision != "float32":  # the stored check may be of another allowed drop
            failed = Gate.of(parity.lost, parity.gained, parity.images, self.allowed).outcome == "fails"
            failed = failed or not math.isfinite(parity.max_logit_difference)
        if failed:
            arm.note = "failed the parity check: not timed"


def _measure(sitting: Sitting, replicates: int, state: BenchmarkState, run: RunDirectory, progress: Progress) -> None:
    """Measure the missing ones of these replicates; rows and state are written after each."""
    todo = range(state.replicates, replicates)
    progress.line(
        f"benchmark: {len(sitting.arms)} arms x batch sizes {sitting.settings.batch_sizes}, {len(todo)} replicates to "
        f"measure, about {duration(len(todo) * sitting.estimated_seconds())}"
    )
    started = time.monotonic()
    for done, number in enumerate(todo, 1):
        rows, cold, profiled = sitting.replicate(number, progress)
        rows = _rows(run) + rows if number else rows
        storage.write_atomically(run.path / ROWS, csv_text(COLUMNS, rows))
        state.replicates, state.cold = number + 1, state.cold + cold
        state.operators = state.operators + profiled
        state.rows_sha256 = storage.sha256(run.path / ROWS)
        state.write(run.path / BENCHMARKED)
        left = (time.monotonic() - started) / done * (len(todo) - done)
        progress.line(f"benchmark: replicate {number + 1} of {replicates} done, {duration(left)} left")


def _judge(
    arms: list[Arm], settings: Benchmark, state: BenchmarkState, run: RunDirectory, look: Look
) -> "tuple[pd.DataFrame, Recommendation]":
    """The summary and the recommendation at a look."""
    import pandas as pd

    rows = [row for row in _rows(run) if look.number is None or row["replicate"] < look.number]
    table = summary.summarize_rounds(rows, state.cold, arms, REFERENCE, AGAIN, settings.max_accuracy_drop, look.alpha)
    return table, verdict.decide(table, pd.DataFrame(rows), settings, REFERENCE, AGAIN, look.alpha)


def _conclude(
    table: "pd.DataFrame", recommended: Recommendation, state: BenchmarkState, run: RunDirectory, progress: Progress
) -> None:
    """Write the summary and the recommendation, and log them."""
    written = [ROWS, "inference_summary.csv", "verdict.json"]
    storage.write_atomically(run.path / "inference_summary.csv", table.to_csv(index=False))
    if profiled := state.operators:
        text = csv_text(profiled[0], profiled)
        storage.write_atomically(run.path / "inference_operators.csv", text)
        written.append("inference_operators.csv")
    recommended.environment = system.environment().to_json()
    recommended.write(run.path / "verdict.json")
    state.files = {name: storage.sha256(run.path / name) for name in written}
    state.write(run.path / BENCHMARKED)
    for line in verdict.verdict_lines(table, recommended, REFERENCE, AGAIN):
        progress.line(f"benchmark: {line}")


def _state(run: RunDirectory, request: Json) -> BenchmarkState:
    """State of an earlier benchmark of the same request whose rows are intact; otherwise an empty one."""
    try:
        found = BenchmarkState.read(run.path / BENCHMARKED)
        if found.request == request and storage.is_intact(run.path / ROWS, found.rows_sha256):
            return found
    except (OSError, ValueError):
        pass
    return BenchmarkState(request=request, replicates=0, cold=[], operators=[])


def _rows(run: RunDirectory) -> list[Json]:
    """Rows of inference.csv."""
    import pandas

    texts = {"call_ms": str, "event_ms": str, "note": str}
    table = pandas.read_csv(run.path / ROWS, dtype=texts, keep_default_na=False)
    return table.to_dict("records")  # type: ignore[return-value]
