"""The run directory: file names, columns, units, reading and writing. Stages meet only here.

    run.json                    resolved configuration, command lines, code digest, data fingerprint, environment
    run.log                     what happened, with times
    trials/<id>/trial.json      variant, seed, configuration, status, metrics, timing, weights_sha256
    trials/<id>/history.csv     a row a validation: losses, accuracies in [0, 1], seconds
    trials/<id>/model.safetensors, error.txt where it failed
    trials.csv                  one row a trial: the fields of trial.json, nested ones with dots
    exported/<id>/              the winner's files and manifest.json
    inference.csv, inference_summary.csv, report/

`status`: finished (its own early stop included), stopped (by the scheduler or the time budget: `stop_reason`), failed,
diverged (the loss is no number), oom. Importing this module is cheap: no torch, no ray, pandas only where it is used.
"""

import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import checkpoint
from harness.errors import BadInput

if TYPE_CHECKING:
    import pandas

TRIAL, HISTORY, WEIGHTS, ERROR = "trial.json", "history.csv", "model.safetensors", "error.txt"
HISTORY_COLUMNS = ("epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")
CODE = (
    "harness/trial.py",
    "harness/step.py",
    "harness/execution.py",
    "harness/kernels.py",
    "harness/kernels.cpp",
    "harness/datasets",
    "architectures",
)


def write_trial(folder: Path, record: Mapping[str, Any], history: Iterable[Mapping[str, Any]] | None = None) -> None:
    """The record, last: a folder with a trial.json is a trial that ended."""
    if history is not None:
        write_history(folder, history)
    checkpoint.write_json(folder / TRIAL, record)


def write_history(folder: Path, history: Iterable[Mapping[str, Any]]) -> None:
    checkpoint.write_atomically(folder / HISTORY, csv_text(HISTORY_COLUMNS, history))


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def flatten(values: Mapping[str, Any], prefix: str = "", *, keep_lists: bool = False) -> dict[str, Any]:
    """Nested mappings as one, names joined with dots; lists become JSON, unless they are kept."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.", keep_lists=keep_lists)
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list | tuple) and not keep_lists else value
    return flat


class RunDirectory:
    """One run's files. Nothing is created before `create`."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def existing(cls, path: Path) -> "RunDirectory":
        """A run that is there; BadInput otherwise."""
        run = cls(path)
        if not run.configuration_file.is_file():
            raise BadInput(f"run={path}: no run directory (it has no run.json); give one that harness.tune has made")
        return run

    @property
    def configuration_file(self) -> Path:
        return self.path / "run.json"

    def trial_folder(self, trial_id: str) -> Path:
        return self.path / "trials" / trial_id

    def exported_folder(self, trial_id: str) -> Path:
        return self.path / "exported" / trial_id

    def configuration(self) -> dict[str, Any] | None:
        """run.json, or None where there is none yet."""
        try:
            return json.loads(self.configuration_file.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise BadInput(f"run={self.path}: run.json is torn ({error}); mend or remove it") from error

    def create(self, configuration: Mapping[str, Any], command: str) -> None:
        """Write run.json for this command; earlier command lines of the run stay in it."""
        earlier = self.configuration() or {}
        kept = {"commands": [*earlier.get("commands", []), command], "plans": earlier.get("plans", {})}
        checkpoint.write_json(self.configuration_file, {**configuration, **kept, "environment": environment()})

    def add_plan(self, architecture: str, choice: Mapping[str, Any]) -> None:
        """Record what was measured for the trials of that architecture, for this command and later ones."""
        recorded = self.configuration() or {}
        plans = {**recorded.get("plans", {}), architecture: dict(choice)}
        checkpoint.write_json(self.configuration_file, {**recorded, "plans": plans})

    def trials(self) -> list[dict[str, Any]]:
        """The records of all trials that ended, by id."""
        found = sorted((self.path / "trials").glob(f"*/{TRIAL}"))
        return [json.loads(path.read_text()) for path in found]

    def history(self, trial_id: str) -> "pandas.DataFrame":
        import pandas

        return pandas.read_csv(self.trial_folder(trial_id) / HISTORY)

    def write_trials_csv(self) -> None:
        rows = [flatten(record) for record in self.trials()]
        columns = dict.fromkeys(name for row in rows for name in row)
        checkpoint.write_atomically(self.path / "trials.csv", csv_text(columns, rows))

    def remove(self, again: Callable[[dict[str, Any]], bool]) -> None:
        """Folders of trials that were interrupted, and of those that are to run again."""
        for folder in (self.path / "trials").glob("*/"):
            file = folder / TRIAL
            if not file.is_file() or again(json.loads(file.read_text())):
                shutil.rmtree(folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; BadInput where another one works on it. A killed process holds nothing."""
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise BadInput(f"run={self.path}: another process works on it; wait for it, or give run=NEW") from error


def is_done(record: Mapping[str, Any]) -> bool:
    """Whether the same command may leave this trial as it is: failures and what the clock stopped run again."""
    if record["status"] == "stopped":
        return record.get("stop_reason") != "time budget"
    return record["status"] in ("finished", "diverged")


def trial_id(config: Mapping[str, Any], seed: int, fingerprint: str) -> str:
    """Derived from configuration, seed and data alone."""
    text = json.dumps([config, seed, fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_digest(architecture: str = "") -> str:
    """Of the files that decide what a trial computes; `architecture` is one of them where it is a user's FILE.py."""
    top = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for name in CODE:
        place = top / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(top)}\0".encode() + path.read_bytes())
    if architecture.endswith(".py"):
        digest.update(Path(architecture).read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def environment() -> dict[str, Any]:
    """Machine and versions, as far as they can be told without importing torch."""
    versions = {}
    for name in ("torch", "torchvision", "ray", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
        "code": code_digest(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
