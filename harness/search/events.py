"""Logs the trial events of a stage, and writes the records of trials whose worker could not.

A worker process records the trials that it finishes. The driver records those that were stopped, and those whose
process died.
"""

import contextlib
import re
import time
from collections.abc import Mapping
from typing import Any

from harness.run import checkpoints, storage, system
from harness.run.directory import RunDirectory
from harness.run.progress import Progress, duration
from harness.run.records import ERROR_FILE, TRIAL_FILE, TrialRecord, read_if_ended, read_trial, write_trial
from harness.search.trials import TrialSpec

# A worker's last report, as Ray Tune passes it on: a history row and the record so far; empty before the first.
Reported = Mapping[str, Any]


class TrialEvents:
    """Follows `total` trials. `last`: a trial's last report, empty before its first validation."""

    def __init__(self, total: int, run: RunDirectory, progress: Progress, metric: str):
        self.total, self.run, self.progress, self.metric = total, run, progress, metric
        self.began = time.monotonic()
        self.table_due = self.began
        self.shares: dict[str, float] = {}  # completed fraction of each started trial, by id
        self.best: float | None = None

    def check_there(self) -> None:
        """Raises FileNotFoundError where the run directory was moved away: nothing must be written in its place."""
        if not self.run.configuration_file.is_file():
            raise FileNotFoundError(
                f"{self.run.path}: the run directory is gone; restore it and run the same command again"
            )

    def started(self, spec: TrialSpec) -> None:
        self.shares[spec.id] = 0.0
        self.progress.line(f"{self._name(spec)}: started")

    def reported(self, spec: TrialSpec, row: Reported) -> None:
        self.shares[spec.id] = min(1.0, row["epoch"] / spec.config.epochs)
        better = max if self.metric == "val_accuracy" else min
        self.best = row[self.metric] if self.best is None else better(self.best, row[self.metric])
        self.progress.status(
            f"{self._summary()}; {spec.id} epoch {row['epoch']:.1f}/{spec.config.epochs}: "
            f"validation {row['val_accuracy']:.4f}"
        )

    def retried(self, spec: TrialSpec, error: str) -> None:
        """Log a retry. `error`: Ray's error text of the failed attempt."""
        self.shares[spec.id] = 0.0
        folder = self.run.trial_folder(spec.id)
        record = read_if_ended(folder)
        with contextlib.suppress(OSError):  # a process that ended itself wrote the reason
            error = (folder / ERROR_FILE).read_text()
        reason = record.error if record and record.error else _reason(error)
        self.progress.line(f"{self._name(spec)}: {reason}; continues from its last checkpoint")

    def is_reported(self, spec: TrialSpec) -> bool:
        """Whether `ended` was called for this trial."""
        return self.shares.get(spec.id) == 1.0

    def stopped(self, spec: TrialSpec, last: Reported, reason: str) -> None:
        """Record a trial that the scheduler or the time budget stopped."""
        self._write(spec, last, status="stopped", stop_reason=reason)
        if reason != "time budget":  # a later command may extend it
            checkpoints.remove_checkpoints(self.run.trial_folder(spec.id))

    def failed(self, spec: TrialSpec, last: Reported, status: str, error: str) -> None:
        """Record a trial whose process died or never started. `error`: Ray's text, used if the process wrote none.

        If the process died after its trial had finished, that record stays.
        """
        folder = self.run.trial_folder(spec.id)
        if (folder / TRIAL_FILE).is_file():
            return
        if (folder / ERROR_FILE).is_file():
            error = (folder / ERROR_FILE).read_text()
        reason = _reason(error)
        storage.acquire(folder)
        storage.write_atomically(folder / ERROR_FILE, error or reason)
        self._write(spec, last, status=status, error=reason)

    def ended(self, spec: TrialSpec) -> None:
        """Log how a trial ended, from its record."""
        record = read_trial(self.run.trial_folder(spec.id))
        self.shares[spec.id] = 1.0
        if time.monotonic() > self.table_due:  # slow with many trials: a twentieth of the time; complete at stage end
            began = time.monotonic()
            self.run.write_trials_csv()
            self.table_due = time.monotonic() + 20 * (time.monotonic() - began)
        self.progress.line(f"{self._name(spec)}: {_outcome(spec, record)}, {duration(record.timing.wall_seconds)}")
        self.progress.status(self._summary())

    def _write(self, spec: TrialSpec, last: Reported, **outcome: str) -> None:
        record = {
            **spec.labels(),
            "seed": spec.seed,
            "config": spec.config.model_dump(mode="json"),
            **outcome,
            **{"metrics": {}, "timing": {"wall_seconds": 0.0}, "environment": system.environment().to_json()},
            **last.get("record", {}),
        }
        folder = self.run.trial_folder(spec.id)
        storage.acquire(folder)  # locks out a process that Ray gave up but that may still run
        write_trial(folder, TrialRecord.model_validate(record))
        storage.release(folder)

    @staticmethod
    def _name(spec: TrialSpec) -> str:
        what = spec.variant or f"sample {spec.index}"
        return f"trial {spec.id} ({spec.stage}, {what}, seed {spec.seed})"

    def _summary(self) -> str:
        done = sum(share == 1 for share in self.shares.values())
        share = sum(self.shares.values()) / self.total
        elapsed = time.monotonic() - self.began
        left = f", about {duration(elapsed / share - elapsed)} left" if 0 < share < 1 else ""
        best = "" if self.best is None else f", best {self.metric} {self.best:.4f}"
        return f"{done} of {self.total} trials done, {len(self.shares) - done} running{best}{left}"


def _outcome(spec: TrialSpec, record: TrialRecord) -> str:
    """The log text of a trial that ended: status, accuracies, and anything unusual."""
    metrics, text = record.metrics, str(record.status)
    if record.status == "stopped":
        text += f" by {record.stop_reason} at epoch {metrics.epochs:g}"
    if metrics.val_accuracy is not None and record.status in ("finished", "stopped"):
        text += f", validation {metrics.val_accuracy:.4f}"
    if metrics.test_accuracy is not None:
        text += f", test {metrics.test_accuracy:.4f}"
    if corrupt := sum(len(once.torn) for once in record.continued):
        text += f", {corrupt} corrupt checkpoints ignored"
    if reason := record.environment.not_checkpointed:
        text += f", not checkpointed: {reason}"
    if record.compiled_anew:
        text += f", trained again after clearing the compile cache: {record.compiled_anew}"
    if record.error is not None:
        changes = " ".join(f"trial.{k}={v}" for k, v in spec.parameters.items())
        text += f" ({changes or 'base configuration'}): {record.error}"
    return text


def _reason(error: str) -> str:
    """The line of Ray's or the process's own error text that gives the reason of its end."""
    if node := re.search(r"node has died.*?[Nn]ode[ _]?[Ii][Dd]:? ?([0-9a-f]{8})", error, re.DOTALL):
        return f"its process died with node {node[1]}"
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    if not lines or "actor died unexpectedly" in error:
        return "its process died"
    return lines[-1] if "Traceback" in error or "ray::" in lines[0] else lines[0]
