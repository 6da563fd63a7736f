"""The run directory: where each file is, which commands work on it, which trials it holds."""

import contextlib
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import BadInput
from harness.config.keys import flatten
from harness.run import checkpoints, storage
from harness.run.records import (
    HISTORY_FILE,
    TRIAL_FILE,
    WEIGHTS_FILE,
    PlanChoice,
    RunRecord,
    TrialRecord,
    read_if_ended,
    read_trial,
)
from harness.run.system import environment
from harness.run.tables import csv_text

if TYPE_CHECKING:
    import pandas

LOCK, OWNER = ".lock", ".owner"
BENCHMARKED = Path("exported") / "benchmarked.json"


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

    def configuration(self) -> RunRecord | None:
        """run.json, its copy where it is corrupt, None where there is none yet. BadInput where both are corrupt."""
        if not self.configuration_file.is_file():
            return None
        with contextlib.suppress(ValueError):
            return RunRecord.read(self.configuration_file)
        try:
            found = RunRecord.read(self._copy)
        except (OSError, ValueError) as error:
            raise BadInput(f"run={self.path}: run.json and its copy are corrupt ({error}); give run=NEW") from error
        self.notice(f"{self.configuration_file}: is corrupt; its copy is used")
        return found

    def recorded(self) -> RunRecord:
        """run.json of a run that is there."""
        found = self.configuration()
        assert found is not None, f"{self.path} has no run.json"
        return found

    @property
    def _copy(self) -> Path:
        return self.path / "run.copy.json"

    def _configure(self, record: RunRecord) -> None:
        for file in (self.configuration_file, self._copy):  # a folder with the copy alone is not a run
            record.write(file)

    def print_notices(self, tell: Callable[[str], None]) -> None:
        """Tell a person what was found wrong with the files, and from now on what is found, each once."""
        self._tell = tell
        for text in self._notices:
            tell(f"warning: {text}")

    def notice(self, text: str) -> None:
        if text not in self._notices and self._tell is not None:
            self._tell(f"warning: {text}")
        self._notices[text] = None

    def create(self, record: RunRecord, command: str) -> None:
        """Write run.json for this command; what earlier commands recorded stays in it."""
        earlier = self.configuration()
        record.commands = [*(earlier.commands if earlier else []), command]
        record.plans, record.code = (earlier.plans, earlier.code) if earlier else ({}, {})
        record.environment = environment().to_json()
        self._configure(record)

    def record_plan(self, architecture: str, plan: PlanChoice) -> None:
        """Record, for later commands too, how the trials of an architecture are executed."""
        recorded = self.recorded()
        recorded.plans = {**recorded.plans, architecture: plan}
        self._configure(recorded)

    def record_code(self, architecture: str, code: dict[str, str]) -> None:
        """Record the digests of the files that train an architecture."""
        recorded = self.recorded()
        if recorded.code.get(architecture) != code:
            recorded.code = {**recorded.code, architecture: code}
            self._configure(recorded)

    def trials(self) -> list[TrialRecord]:
        """The records of all trials that ended, by id; corrupt ones are left out."""
        records = []
        for path in sorted((self.path / "trials").glob(f"*/{TRIAL_FILE}")):
            try:
                records.append(read_trial(path.parent))
            except ValueError:
                self.notice(f"{path}: is corrupt; the trial has to run again")
        return records

    def set_aside_corrupt(self) -> None:
        """Remove the records of trials of which a file is corrupt or the history missing: they run again.

        Weights that are absent are no fault: results are stored and shared without them.
        """
        for record in self.trials():
            folder = self.trial_folder(record.id)
            for name, digest in ((HISTORY_FILE, record.history_sha256), (WEIGHTS_FILE, record.weights_sha256)):
                absent = name == WEIGHTS_FILE and not (folder / name).exists()
                if digest is not None and not absent and not storage.is_intact(folder / name, digest):
                    self.notice(f"{folder / name}: is corrupt or missing; the trial has to run again")
                    (folder / TRIAL_FILE).unlink(missing_ok=True)

    def history(self, trial_id: str) -> "pandas.DataFrame":
        import pandas

        return pandas.read_csv(self.trial_folder(trial_id) / HISTORY_FILE)

    def write_trials_csv(self) -> None:
        rows = [flatten(record.to_json()) for record in self.trials()]
        columns = dict.fromkeys(name for row in rows for name in row)
        storage.write_atomically(self.path / "trials.csv", csv_text(columns, rows))

    def is_benchmark_intact(self, name: str) -> bool:
        """Whether that file of the run is the one that its inference benchmark wrote."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return storage.is_intact(self.path / name, storage.read_json(self.path / BENCHMARKED)["files"][name])
        return False

    def remove(self, again: Callable[[TrialRecord], bool], continued: Collection[str] | None = None) -> None:
        """What trials left that are to run again, or were interrupted and are in `continued`: all but checkpoints.

        Without `continued`, all that interrupted ones left. Others may be of a later stage, or of other variants.
        """
        for folder in (self.path / "trials").glob("*/"):
            file, record = folder / TRIAL_FILE, read_if_ended(folder)
            if record is not None and not again(record):
                continue
            if continued is None:
                shutil.rmtree(folder)
                continue
            if record is None and folder.name not in continued:
                continue
            file.unlink(missing_ok=True)  # first: what is left is an interrupted trial
            for other in set(folder.iterdir()) - set(checkpoints.checkpoint_files(folder)):
                other.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; BadInput where another one works on it. A killed process holds nothing."""
        from filelock import FileLock, Timeout

        owner = self.path / OWNER
        with storage.storage_errors_of(owner):
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
            storage.write_json(owner, {"host": platform.node(), "process": os.getpid()})
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def _owner(self) -> str:
        """Who holds the lock, or did when it ended; empty where nobody says so."""
        with contextlib.suppress(OSError, ValueError):
            found = storage.read_json(self.path / OWNER)
            return f"process {found['process']} on host {found['host']}"
        return ""
