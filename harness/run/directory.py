"""The run directory: the paths of its files, its lock, its configuration and its trials."""

import contextlib
import os
import platform
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import BadInput
from harness.run import checkpoints, storage
from harness.run.records import (
    HISTORY_COLUMNS,
    HISTORY_FILE,
    TRIAL_FILE,
    WEIGHTS_FILE,
    LookRecord,
    PlanChoice,
    RunRecord,
    TrialRecord,
    read_if_ended,
    read_trial,
)
from harness.run.system import environment
from harness.run.tables import csv_text, read_table

if TYPE_CHECKING:
    import pandas

LOCK, OWNER = ".lock", ".owner"
BENCHMARKED = Path("exported") / "benchmarked.json"


class RunDirectory:
    """The files of one run. Nothing is written before `create` or `locked`."""

    def __init__(self, path: Path):
        self.path = path
        self._notices: dict[str, None] = {}
        self._tell: Callable[[str], None] | None = None

    @classmethod
    def existing(cls, path: Path) -> "RunDirectory":
        """An existing run. Raises BadInput where there is no run.json."""
        run = cls(path)
        if not run.configuration_file.is_file():
            raise BadInput(f"run={path}: no run directory (it has no run.json); give one that harness.tune has made")
        return run

    @property
    def configuration_file(self) -> Path:
        return self.path / "run.json"

    @property
    def winner_file(self) -> Path:
        return self.path / "winner.json"

    def trial_folder(self, trial_id: str) -> Path:
        return self.path / "trials" / trial_id

    def exported_folder(self, trial_id: str) -> Path:
        return self.path / "exported" / trial_id

    def configuration(self) -> RunRecord | None:
        """run.json, or its copy if run.json is corrupt; None for a new run. Raises BadInput where both are corrupt."""
        if not self.configuration_file.is_file():
            return None
        with contextlib.suppress(storage.Corrupt):
            return RunRecord.read(self.configuration_file)
        try:
            found = RunRecord.read(self._copy)
        except (OSError, storage.Corrupt) as error:
            raise BadInput(f"run={self.path}: run.json and its copy are corrupt ({error}); give run=NEW") from error
        self.notice(f"{self.configuration_file}: is corrupt; using run.copy.json")
        return found

    def recorded(self) -> RunRecord:
        """run.json of an existing run."""
        found = self.configuration()
        assert found is not None, f"{self.path} has no run.json"
        return found

    @property
    def _copy(self) -> Path:
        return self.path / "run.copy.json"

    def _configure(self, record: RunRecord) -> None:
        for file in (self.configuration_file, self._copy):  # run.json first: a folder with only the copy is not a run
            record.write(file)

    def print_notices(self, tell: Callable[[str], None]) -> None:
        """Report the problems found with the files so far, and later ones as they are found, each once."""
        self._tell = tell
        for text in self._notices:
            tell(f"warning: {text}")

    def notice(self, text: str) -> None:
        if text not in self._notices and self._tell is not None:
            self._tell(f"warning: {text}")
        self._notices[text] = None

    def create(self, record: RunRecord, command: str) -> None:
        """Write run.json for this command, with the commands, plans and code recorded earlier."""
        earlier = self.configuration()
        record.commands = [*(earlier.commands if earlier else []), command]
        if earlier:
            record.plans, record.code, record.looks = earlier.plans, earlier.code, earlier.looks
        record.environment = environment().to_json()
        self._configure(record)

    def record_plan(self, architecture: str, plan: PlanChoice) -> None:
        """Record the execution plan of an architecture's trials, also for later commands."""
        recorded = self.recorded()
        recorded.plans = {**recorded.plans, architecture: plan}
        self._configure(recorded)

    def record_look(self, look: LookRecord) -> None:
        """Record a look at the claims."""
        recorded = self.recorded()
        recorded.looks = [*recorded.looks, look]
        self._configure(recorded)

    def record_code(self, architecture: str, code: dict[str, str]) -> None:
        """Record the digests of the files that train an architecture."""
        recorded = self.recorded()
        if recorded.code.get(architecture) != code:
            recorded.code = {**recorded.code, architecture: code}
            self._configure(recorded)

    def trials(self) -> list[TrialRecord]:
        """The records of all trials that ended, sorted by id, without corrupt ones."""
        records = []
        for path in sorted((self.path / "trials").glob(f"*/{TRIAL_FILE}")):
            try:
                record = read_trial(path.parent)
            except (storage.Corrupt, OSError):
                self.notice(f"{path}: is corrupt; the trial must run again")
                continue
            if record.id == path.parent.name:
                records.append(record)
            else:
                self.notice(f"{path}: is of trial {record.id}; left out")
        return records

    def set_aside_corrupt(self) -> None:
        """Remove the records of trials with a corrupt file or without a history, so that they run again.

        Missing weights are no error: results may be stored and shared without them.
        """
        for record in self.trials():
            folder = self.trial_folder(record.id)
            for name, digest in ((HISTORY_FILE, record.history_sha256), (WEIGHTS_FILE, record.weights_sha256)):
                absent = name == WEIGHTS_FILE and not (folder / name).exists()
                if digest is not None and not absent and not storage.is_intact(folder / name, digest):
                    self.notice(f"{folder / name}: is corrupt or missing; the trial must run again")
                    (folder / TRIAL_FILE).unlink(missing_ok=True)

    def history(self, trial_id: str) -> "pandas.DataFrame":
        return read_table(self.trial_folder(trial_id) / HISTORY_FILE, set(HISTORY_COLUMNS) - {"lr"})  # new in 0.3

    def write_winner(self, winner: TrialRecord) -> None:
        """Write the whole configuration of a trial and of its data, which `space=` takes to train it again."""
        data = self.recorded().config["data"]
        storage.write_json(self.winner_file, {"id": winner.id, "trial": winner.config, "data": data})

    def has_winner(self, winner: TrialRecord) -> bool:
        """Whether winner.json is intact and of this trial."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return bool(storage.read_json(self.winner_file)["id"] == winner.id)
        return False

    def write_trials_csv(self) -> None:
        rows = [record.row() for record in self.trials()]
        columns = dict.fromkeys(name for row in rows for name in row)
        storage.write_atomically(self.path / "trials.csv", csv_text(columns, rows))

    def is_benchmark_intact(self, name: str) -> bool:
        """Whether a file of the run is intact since the inference benchmark wrote it."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return storage.is_intact(self.path / name, storage.read_json(self.path / BENCHMARKED)["files"][name])
        return False

    def remove(self, again: Callable[[TrialRecord], bool], continued: Collection[str] | None = None) -> None:
        """Remove the files, but for checkpoints, of ended trials to run `again` and of interrupted ones in `continued`.

        Other interrupted trials may belong to a later stage or other variants. Without `continued`, remove the
        entire folders of trials to run again and of all interrupted ones.
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
            file.unlink(missing_ok=True)  # first: without it, the trial counts as interrupted
            for other in set(folder.iterdir()) - set(checkpoints.checkpoint_files(folder)):
                other.unlink()

    def check_own(self) -> None:
        """Raises BadInput where the run is not writable, or holds links or pipes: what they lead to must not be
        written, or would hang."""
        storage.check_writable(self.path, "run")
        for folder, folders, files in os.walk(self.path):
            for name in (*folders, *files):
                path = Path(folder, name)
                found = path.lstat()
                mode = found.st_mode
                if name == "run.log" and found.st_nlink > 1:  # the only file that is appended to
                    raise BadInput(f"run={self.path}: run.log is also another file (a hard link); remove it here")
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    kind = "a link; put what it leads to in its place" if stat.S_ISLNK(mode) else "no file; remove it"
                    raise BadInput(f"run={self.path}: {path.relative_to(self.path)} is {kind}, or give run=NEW")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run. Raises BadInput where another process works on it; a killed process holds no lock."""
        from filelock import FileLock, Timeout

        self.check_own()
        owner = self.path / OWNER
        with storage.storage_errors_of(owner):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            who = self._owner() or "another process"
            raise BadInput(f"run={self.path}: {who} is working on it; wait until it ends, or give run=NEW") from error
        try:
            if before := self._owner():
                self.notice(f"{before} was killed while it worked on this run; taking over its lock")
            storage.write_json(owner, {"host": platform.node(), "process": os.getpid()})
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def _owner(self) -> str:
        """The process that holds the lock, or held it when it was killed; empty if none is recorded."""
        with contextlib.suppress(OSError, ValueError):
            found = storage.read_json(self.path / OWNER)
            return f"process {found['process']} on host {found['host']}"
        return ""
