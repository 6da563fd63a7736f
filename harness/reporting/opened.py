"""A run directory opened for reading: trials, ranking, claims, winner and exported files.

from harness import open_run
run = open_run("runs/quick-1a2b3c4d")
run.trials[["id", "metrics.val_accuracy"]]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.reporting.results import findings_of, winners_manifest
from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest
from harness.run.records import RunRecord, TrialRecord
from harness.stats.claims import Finding
from harness.stats.ranking import Ranked, rank, winning_trial

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class OpenRun:
    """Each property reads the files again at each access: the run may still be in progress."""

    directory: RunDirectory

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def record(self) -> RunRecord:
        """The contents of run.json."""
        return self.directory.recorded()

    @property
    def records(self) -> list[TrialRecord]:
        """The trial.json of each trial that has ended."""
        return self.directory.trials()

    @property
    def trials(self) -> "pd.DataFrame":
        """One row per trial that has ended, with the columns of trials.csv."""
        import pandas as pd

        return pd.DataFrame([record.row() for record in self.records])

    def history(self, trial: str) -> "pd.DataFrame":
        """One row per validation of that trial."""
        return self.directory.history(trial)

    @property
    def ranking(self) -> list[Ranked]:
        """Configurations, best first; `tied`: not shown to be worse than the best at 95 %."""
        return rank(self.records, self.record.metric)

    @property
    def claims(self) -> list[Finding]:
        """The findings about the claims of an ablation."""
        return findings_of(self.record, self.records)

    @property
    def winner(self) -> TrialRecord | None:
        """The best configuration's trial with the best validation, which is exported; None if none has finished."""
        ranked = self.ranking
        return winning_trial(ranked[0], self.record.metric) if ranked else None

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the winner's export; None if it is not exported."""
        return winners_manifest(self.directory, self.winner)

    @property
    def files(self) -> dict[str, Path]:
        """Paths of the winner's exported files, by name; empty if it is not exported."""
        manifest = self.manifest
        folder = self.directory.exported_folder(manifest.id) if manifest else Path()
        return {name: folder / name for name in manifest.files} if manifest else {}


def open_run(path: Path | str) -> OpenRun:
    """Open a run directory for reading. Raises BadInput where `path` has no run.json."""
    return OpenRun(RunDirectory.existing(Path(path).expanduser().absolute()))
