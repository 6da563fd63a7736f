"""Forwards Ray Tune's callbacks to TrialEvents."""

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray and its dependencies announce their own future changes
    import ray
    from ray import tune

from harness.config import stopping
from harness.search.events import TrialEvents
from harness.search.ray_internals import EndedForMemory
from harness.search.searchers import NotPickled
from harness.search.trials import TrialSpec

# The trials in Ray Tune's callbacks; Ray has no types.
TuneTrial = Any


class Watcher(NotPickled, tune.Callback):  # type: ignore[misc]  # ray has no types
    """Ray Tune's callbacks; `specs`: the trials by id."""

    def __init__(self, specs: dict[str, TrialSpec], events: TrialEvents):
        self.specs, self.events = specs, events

    def spec(self, trial: TuneTrial) -> TrialSpec:
        return self.specs[trial.config["job"]["labels"]["id"]]

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        stopping.check_stopped()
        self.events.check_there()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self.events.started(self.spec(trial))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Any, **info: Any
    ) -> None:
        if not result["done"]:
            self.events.reported(self.spec(trial), result)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self.events.retried(self.spec(trial), str(self._error(trial) or ""))

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        spec, last = self.spec(trial), trial.last_result or {}
        if not last.get("recorded"):
            self.events.stopped(spec, last, "asha")
        self.events.ended(spec)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        spec, error = self.spec(trial), self._error(trial)
        status = "oom" if isinstance(error, EndedForMemory) else "failed"
        self.events.failed(spec, trial.last_result or {}, status, str(error or ""))
        self.events.ended(spec)

    @staticmethod
    def _error(trial: TuneTrial) -> BaseException | None:
        with contextlib.suppress(OSError, TypeError):  # Ray's own getter may look before the file exists
            error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
            return error if isinstance(error, BaseException) else None
        return None

    def out_of_time(self, trials: Sequence[TuneTrial]) -> None:
        """Record the trials that the time budget stopped, for which Ray fires no callback. Trials that never started
        stay missing."""
        for trial in trials:
            spec, last = self.spec(trial), trial.last_result or {}
            if self.events.is_reported(spec) or not (last.get("recorded") or "record" in last):
                continue
            if not last.get("recorded"):
                self.events.stopped(spec, last, "time budget")
            self.events.ended(spec)
