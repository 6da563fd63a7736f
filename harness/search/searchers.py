"""Ray Tune's searchers and scheduler, initialised with the results of earlier trials."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray and its dependencies announce their own future changes
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

from harness.config import Search
from harness.run.directory import RunDirectory
from harness.run.records import HISTORY_FILE
from harness.run.storage import Json
from harness.search.ray_internals import brackets_of, has_suggested
from tune_spaces import Choice, Domain, Integer, LogUniform

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class NotPickled:
    """Has no state for Ray to pickle: a run is restored from the run directory."""

    def __getstate__(self) -> Json:
        return {}


class InOrder(NotPickled, Searcher):  # type: ignore[misc]  # ray has no types
    """Hands out trials that are known beforehand, each when it can start: Ray's own grid copies the whole list for each
    trial."""

    def __init__(self, configs: Iterator[Json], **options: Any):
        super().__init__(**options)
        self._configs = configs

    def suggest(self, trial_id: str) -> Json | str:
        return next(self._configs, Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("the run directory restores")


class OptunaSamples(NotPickled, OptunaSearch):  # type: ignore[misc]  # ray has no types
    """Optuna's suggestions as the trials of the missing indices; sample 0 is the base configuration, not suggested."""

    def __init__(
        self,
        indices: Sequence[int],
        make: Callable[[Json, int], Json],
        parameters: Mapping[str, Domain],
        **options: Any,
    ):
        super().__init__(space={key: optuna_distribution(domain) for key, domain in parameters.items()}, **options)
        self._indices = list(indices)
        self._make = make
        self._choices = [key for key, domain in parameters.items() if isinstance(domain, Choice)]

    def suggest(self, trial_id: str) -> Json | None:
        if not self._indices:
            return None
        index = self._indices.pop(0)
        found = {} if index == 0 else super().suggest(trial_id)
        return self._make({k: json.loads(v) if k in self._choices else v for k, v in found.items()}, index)

    def add_result(self, parameters: Json, value: float) -> None:
        """Add an earlier trial's result, unless the space no longer holds its values."""
        with contextlib.suppress(ValueError):
            given = {k: _as_text(v) if k in self._choices else v for k, v in parameters.items()}
            self.add_evaluated_point(given, value)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def on_trial_result(self, trial_id: str, result: Any) -> None:
        if has_suggested(self, trial_id):
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        if has_suggested(self, trial_id):
            super().on_trial_complete(trial_id, result, error)


def make_scheduler(search: Search, epochs: int, run: RunDirectory) -> TrialScheduler:
    """The configured scheduler, initialised with the histories of the search's trials that have ended.

    A trial that is continued from a checkpoint reports its earlier validations itself.
    """
    if search.scheduler == "fifo":
        return FIFOScheduler()
    scheduler = AsyncHyperBandScheduler(
        time_attr="epoch",
        max_t=epochs,
        grace_period=search.asha.grace_epochs,
        reduction_factor=search.asha.reduction_factor,
        stop_last_trials=False,
    )
    (bracket,) = brackets_of(scheduler)
    sign = 1.0 if search.mode == "max" else -1.0
    for record in run.trials():
        has_history = (run.trial_folder(record.id) / HISTORY_FILE).is_file()
        if record.stage == "search" and record.is_done and has_history:
            for row in run.history(record.id).to_dict("records"):
                bracket.on_result(SimpleNamespace(trial_id=record.id), row["epoch"], sign * row[search.metric])
    return scheduler


def _as_text(value: Any) -> str:
    """A value of a Choice as Optuna gets it: its categories must not be lists."""
    return json.dumps(value)


def optuna_distribution(domain: Domain) -> "BaseDistribution":
    """Convert a domain of a space to Optuna's distribution."""
    from optuna import distributions

    if isinstance(domain, Choice):
        return distributions.CategoricalDistribution([_as_text(value) for value in domain.values])
    if isinstance(domain, Integer):
        return distributions.IntDistribution(domain.low, domain.high)
    return distributions.FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))
