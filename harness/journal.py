"""What happened to the trials of a stage: told to the person at once, and recorded where no worker could record it."""

import contextlib
import re
import time
from collections.abc import Mapping
from typing import Any

from harness import checkpoint, results
from harness.plan import Planned
from harness.progress import Progress, duration


class Journal:
    """Follows `total` trials; `last` is always the last row that a trial reported, empty before its first."""

    def __init__(self, total: int, run: results.RunDirectory, progress: Progress, metric: str):
        self.total, self.run, self.progress, self.metric = total, run, progress, metric
        self.began = time.monotonic()
        self.table_due = self.began
        self.shares: dict[str, float] = {}
        self.best: float | None = None

    def check_there(self) -> None:
        """FileNotFoundError where somebody moved the run directory away: nothing is to be written in its place."""
        if not self.run.configuration_file.is_file():
            raise FileNotFoundError(
                f"{self.run.path}: the run directory is gone; once it is back the command continues"
            )

    def started(self, planned: Planned) -> None:
        self.shares[planned.id] = 0.0
        self.progress.line(f"{self._name(planned)}: started")

    def reported(self, planned: Planned, row: Mapping[str, Any]) -> None:
        self.shares[planned.id] = min(1.0, row["epoch"] / planned.config.epochs)
        better = max if self.metric == "val_accuracy" else min
        self.best = row[self.metric] if self.best is None else better(self.best, row[self.metric])
        self.progress.status(
            f"{self._summary()}; {planned.id} epoch {row['epoch']:.1f}/{planned.config.epochs}: "
            f"validation {row['val_accuracy']:.4f}"
        )

    def retried(self, planned: Planned, error: str) -> None:
        """`error`: of the attempt that ended, as Ray has it."""
        self.shares[planned.id] = 0.0
        folder = self.run.trial_folder(planned.id)
        record = results.ended(folder)
        with contextlib.suppress(OSError):  # of one that ended itself: the way it was found
            error = (folder / results.ERROR).read_text()
        reason = record["error"] if record and "error" in record else _reason(error)
        self.progress.line(f"{self._name(planned)}: {reason}; goes on from its last checkpoint")

    def is_told(self, planned: Planned) -> bool:
        """Whether `ended` was called for it."""
        return self.shares.get(planned.id) == 1.0

    def stopped(self, planned: Planned, last: Mapping[str, Any], reason: str) -> None:
        """Record a trial that was stopped from outside."""
        self._write(planned, last, "stopped", {"stop_reason": reason})
        if reason != "time budget":  # which a later command may lengthen
            checkpoint.remove_generations(self.run.trial_folder(planned.id))

    def failed(self, planned: Planned, last: Mapping[str, Any], status: str, error: str) -> None:
        """Record a trial whose process died or never began; `error` is the whole text, unless the process left one.

        A process may die after its trial has finished: that one's record stays.
        """
        folder = self.run.trial_folder(planned.id)
        if (folder / results.TRIAL).is_file():
            return
        if (folder / results.ERROR).is_file():
            error = (folder / results.ERROR).read_text()
        reason = _reason(error)
        checkpoint.take(folder)
        checkpoint.write_atomically(folder / results.ERROR, error or reason)
        self._write(planned, last, status, {"error": reason})

    def ended(self, planned: Planned) -> None:
        """Tell how a trial ended, from its record."""
        record = results.read_trial(self.run.trial_folder(planned.id))
        self.shares[planned.id] = 1.0
        if time.monotonic() > self.table_due:  # the stage writes it at its end; of many trials it takes long
            began = time.monotonic()
            self.run.write_trials_csv()
            self.table_due = time.monotonic() + 20 * (time.monotonic() - began)
        metrics, status = record["metrics"], record["status"]
        text = f"{self._name(planned)}: {status}"
        if status == "stopped":
            text += f" by {record['stop_reason']} at epoch {metrics['epochs']:g}"
        if "val_accuracy" in metrics and status in ("finished", "stopped"):
            text += f", validation {metrics['val_accuracy']:.4f}"
        if "test_accuracy" in metrics:
            text += f", test {metrics['test_accuracy']:.4f}"
        if torn := sum(len(once["torn"]) for once in record.get("continued", [])):
            text += f", {torn} of its checkpoints torn and not used"
        if reason := record["environment"].get("not_checkpointed"):
            text += f", not checkpointed: {reason}"
        if reason := record.get("compiled_anew"):
            text += f", compiled anew: {reason}"
        if "error" in record:
            changes = " ".join(f"{k}={v}" for k, v in planned.parameters.items())
            text += f" ({changes or 'base configuration'}): {record['error']}"
        self.progress.line(f"{text}, {duration(record['timing']['wall_seconds'])}")
        self.progress.status(self._summary())

    def _write(self, planned: Planned, last: Mapping[str, Any], status: str, why: Mapping[str, Any]) -> None:
        record = {
            **planned.labels(),
            "seed": planned.seed,
            "config": planned.config.model_dump(mode="json"),
            "status": status,
            **why,
            **{"metrics": {}, "timing": {"wall_seconds": 0.0}, "environment": results.environment()},
            **last.get("record", {}),
        }
        folder = self.run.trial_folder(planned.id)
        checkpoint.take(folder)  # from a process that was given up and may come back
        results.write_trial(folder, record)
        checkpoint.leave(folder)

    @staticmethod
    def _name(planned: Planned) -> str:
        what = planned.variant or f"sample {planned.index}"
        return f"trial {planned.id} ({planned.stage}, {what}, seed {planned.seed})"

    def _summary(self) -> str:
        done = sum(share == 1 for share in self.shares.values())
        share = sum(self.shares.values()) / self.total
        elapsed = time.monotonic() - self.began
        left = f", about {duration(elapsed / share - elapsed)} left" if 0 < share < 1 else ""
        best = "" if self.best is None else f", best {self.metric} {self.best:.4f}"
        return f"{done} of {self.total} trials done, {len(self.shares) - done} running{best}{left}"


def _reason(error: str) -> str:
    """One line of what Ray or the process itself says of its end."""
    if node := re.search(r"node has died.*?[Nn]ode[ _]?[Ii][Dd]:? ?([0-9a-f]{8})", error, re.DOTALL):
        return f"its process died with node {node[1]}"
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    if not lines or "actor died unexpectedly" in error:
        return "its process died"
    return lines[-1] if "Traceback" in error or "ray::" in lines[0] else lines[0]
