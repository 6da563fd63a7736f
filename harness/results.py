"""The run directory: file names, columns, units, reading and writing. Stages meet only here.

    run.json                    resolved configuration, command lines, code digest, data fingerprint, environment
    run.copy.json               the same, to be read where run.json is torn
    run.log                     what happened, with times
    trials/<id>/trial.json      variant, seed, configuration, status, metrics, timing, weights_sha256
    trials/<id>/history.csv     a row a validation: losses, accuracies in [0, 1], seconds
    trials/<id>/model.safetensors, error.txt where it failed, checkpoint-*.safetensors while it runs
    trials.csv                  one row a trial: the fields of trial.json, nested ones with dots
    exported/<id>/              the winner's files and manifest.json
    inference.csv, inference_summary.csv, report/, inspect/<id>/<image>/

A trial's folder has .attempt while a process works on it.

`status`: finished (its own early stop included), stopped (by the scheduler or the time budget: `stop_reason`), failed,
diverged (the loss is no number), oom. JSON files hold their own SHA-256, and those of the files beside them that are
read again: a torn file is told, and what it held is made again. Importing this module is cheap: no torch, no ray,
pandas only where it is used.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import checkpoint, gpus
from harness.errors import BadInput

if TYPE_CHECKING:
    import pandas

LOCK, OWNER = ".lock", ".owner"
BENCHMARKED = Path("exported") / "benchmarked.json"
TRIAL, HISTORY, WEIGHTS, ERROR = "trial.json", "history.csv", "model.safetensors", "error.txt"
HISTORY_COLUMNS = ("epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds")
CODE = (
    "harness/trial.py",
    "harness/evaluation.py",
    "harness/step.py",
    "harness/batches.py",
    "harness/features.py",
    "harness/execution.py",
    "harness/kernels.py",
    "harness/native.py",
    "harness/kernels.cpp",
    "harness/winograd.cpp",
    "harness/direct.cpp",
    "harness/datasets/*.py",
    "architectures/_*.py",
)


def write_trial(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record, last: a folder with a trial.json is a trial that ended. Returns it with the digest of its history."""
    written = dict(record)
    if (folder / HISTORY).is_file():
        written["history_sha256"] = checkpoint.sha256(folder / HISTORY)
    checkpoint.write_json(folder / TRIAL, written)
    return written


def read_trial(folder: Path) -> dict[str, Any]:
    """The record of a trial that ended; ValueError where it is torn."""
    return checkpoint.read_json(folder / TRIAL)


def ended(folder: Path) -> dict[str, Any] | None:
    """The record of a trial, None where it has not ended or the record is torn."""
    with contextlib.suppress(OSError, ValueError):
        return read_trial(folder)
    return None


def write_history(folder: Path, history: Iterable[Mapping[str, Any]]) -> None:
    checkpoint.write_atomically(folder / HISTORY, csv_text(HISTORY_COLUMNS, history))


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_measured(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A table of measurements, and beside it, as .json, the machine that they were made on."""
    checkpoint.write_atomically(path, csv_text(columns, rows))
    checkpoint.write_json(path.with_suffix(".json"), environment())


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
        self._notices: dict[str, None] = {}
        self._tell: Callable[[str], None] | None = None

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
        """run.json, its copy where it is torn, None where there is none yet. BadInput where both are torn."""
        if not self.configuration_file.is_file():
            return None
        with contextlib.suppress(ValueError):
            return checkpoint.read_json(self.configuration_file)
        try:
            found = checkpoint.read_json(self._copy)
        except (OSError, ValueError) as error:
            raise BadInput(f"run={self.path}: run.json and its copy are torn ({error}); give run=NEW") from error
        self.notice(f"{self.configuration_file}: is torn; its copy is used")
        return found

    @property
    def _copy(self) -> Path:
        return self.path / "run.copy.json"

    def _configure(self, configuration: Mapping[str, Any]) -> None:
        for file in (self.configuration_file, self._copy):  # a folder with the copy alone would be nobody's run
            checkpoint.write_json(file, configuration)

    def tell_notices(self, tell: Callable[[str], None]) -> None:
        """Tell a person what was found wrong with the files, and from now on what is found, each once."""
        self._tell = tell
        for text in self._notices:
            tell(f"warning: {text}")

    def notice(self, text: str) -> None:
        if text not in self._notices and self._tell is not None:
            self._tell(f"warning: {text}")
        self._notices[text] = None

    def create(self, configuration: Mapping[str, Any], command: str) -> None:
        """Write run.json for this command; earlier command lines of the run stay in it."""
        earlier = self.configuration() or {}
        kept = {"commands": [*earlier.get("commands", []), command]}
        kept |= {what: earlier.get(what, {}) for what in ("plans", "code")}
        self._configure({**configuration, **kept, "environment": environment()})

    def record(self, what: str, architecture: str, found: Mapping[str, Any]) -> None:
        """Record of an architecture, for later commands too, the plan that was chosen (`plans`) or the `code`."""
        recorded = self.configuration() or {}
        if recorded.get(what, {}).get(architecture) != found:
            self._configure({**recorded, what: {**recorded.get(what, {}), architecture: dict(found)}})

    def trials(self) -> list[dict[str, Any]]:
        """The records of all trials that ended, by id; torn ones are none."""
        records = []
        for path in sorted((self.path / "trials").glob(f"*/{TRIAL}")):
            try:
                records.append(read_trial(path.parent))
            except ValueError:
                self.notice(f"{path}: is torn; the trial has to run again")
        return records

    def set_aside_torn(self) -> None:
        """Take their records from trials of which a file is torn or the history missing: they run again.

        Weights that are not there at all are nobody's fault: results are kept and passed on without them.
        """
        for record in self.trials():
            folder = self.trial_folder(record["id"])
            for name, digest in ((HISTORY, "history_sha256"), (WEIGHTS, "weights_sha256")):
                absent = name == WEIGHTS and not (folder / name).exists()
                if digest in record and not absent and not checkpoint.is_whole(folder / name, record[digest]):
                    self.notice(f"{folder / name}: is torn or missing; the trial has to run again")
                    (folder / TRIAL).unlink(missing_ok=True)

    def history(self, trial_id: str) -> "pandas.DataFrame":
        import pandas

        return pandas.read_csv(self.trial_folder(trial_id) / HISTORY)

    def write_trials_csv(self) -> None:
        rows = [flatten(record) for record in self.trials()]
        columns = dict.fromkeys(name for row in rows for name in row)
        checkpoint.write_atomically(self.path / "trials.csv", csv_text(columns, rows))

    def is_benchmark_whole(self, name: str) -> bool:
        """Whether that file of the run is the one that its inference benchmark wrote."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return checkpoint.is_whole(self.path / name, checkpoint.read_json(self.path / BENCHMARKED)["files"][name])
        return False

    def remove(self, again: Callable[[dict[str, Any]], bool], continued: Collection[str] | None = None) -> None:
        """What trials left that are to run again, or were interrupted and are in `continued`: all but checkpoints.

        Without `continued`, all that interrupted ones left. Others may be of a later stage, or of other variants.
        """
        for folder in (self.path / "trials").glob("*/"):
            file, record = folder / TRIAL, ended(folder)
            if record is not None and not again(record):
                continue
            if continued is None:
                shutil.rmtree(folder)
                continue
            if record is None and folder.name not in continued:
                continue
            file.unlink(missing_ok=True)  # first: what is left is an interrupted trial
            for other in set(folder.iterdir()) - set(checkpoint.generations(folder)):
                other.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; BadInput where another one works on it. A killed process holds nothing."""
        from filelock import FileLock, Timeout

        owner = self.path / OWNER
        with checkpoint.storage_errors_of(owner):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            who = self._owner() or "another process"
            raise BadInput(f"run={self.path}: {who} works on it; wait for it, or give run=NEW") from error
        try:
            if before := self._owner():
                self.notice(f"{before} worked on this run and ended without a word; its lock is taken over")
            checkpoint.write_json(owner, {"host": platform.node(), "process": os.getpid()})
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def _owner(self) -> str:
        """Who holds the lock, or did when it ended; empty where nobody says so."""
        with contextlib.suppress(OSError, ValueError):
            found = checkpoint.read_json(self.path / OWNER)
            return f"process {found['process']} on host {found['host']}"
        return ""


def is_done(record: Mapping[str, Any]) -> bool:
    """Whether the same command may leave this trial as it is: failures and what the clock stopped run again."""
    if record["status"] == "stopped":
        return record.get("stop_reason") != "time budget"
    return record["status"] in ("finished", "diverged")


def trial_id(config: Mapping[str, Any], seed: int, fingerprint: str) -> str:
    """Derived from all that the result depends on: configuration, seed and data."""
    decides = {name: value for name, value in config.items() if name not in ("checkpoint_seconds", "cache_features")}
    text = json.dumps([decides, seed, fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_files(architecture: str) -> dict[str, str]:
    """Digests of the files that decide what a trial of that architecture (a name or FILE.py) computes."""
    top = Path(__file__).parent.parent
    own = Path(architecture) if architecture.endswith(".py") else top / "architectures" / f"{architecture}.py"
    files = {str(path.relative_to(top)): path for pattern in CODE for path in sorted(top.glob(pattern))}
    files[f"architectures/{own.name}"] = own
    return {name: checkpoint.sha256(path)[:16] for name, path in files.items()}


def code_digest(architecture: str) -> str:
    return hashlib.sha256(json.dumps(code_files(architecture)).encode()).hexdigest()[:16]


@functools.cache
def environment() -> dict[str, Any]:
    """Machine, GPUs and versions; torch is imported where there are GPUs alone."""
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
        "gpus": gpus.described(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
