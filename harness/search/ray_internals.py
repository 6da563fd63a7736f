"""All private parts of Ray that this project relies on; tests/test_search.py checks that each exists.

pyproject.toml pins ray below the first untested version.
"""

import warnings
from collections.abc import Sequence
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray and its dependencies announce their own future changes
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.tune import ResultGrid
    from ray.tune.schedulers import AsyncHyperBandScheduler
    from ray.tune.search.optuna import OptunaSearch


class EndedForMemory(RayActorError):  # type: ignore[misc]  # ray has no types
    """Ray's memory monitor killed a worker, before the operating system would kill a process."""


_task_failed = RayActorManager._actor_task_failed


def _fail_alone(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
    """Fail only the trial whose worker Ray's memory monitor killed: Ray Tune would abort the whole sweep."""
    if isinstance(exception, OutOfMemoryError):
        exception = EndedForMemory(
            error_msg="its process was killed by Ray's memory monitor: the node was running out of memory"
        )
    _task_failed(self, tracked_actor_task, exception)


RayActorManager._actor_task_failed = _fail_alone


def brackets_of(scheduler: AsyncHyperBandScheduler) -> Sequence[Any]:
    """ASHA's brackets of rungs, which Ray's public API restores only from its own pickles."""
    return list(scheduler._brackets)


def has_suggested(search: OptunaSearch, trial_id: str) -> bool:
    """Whether Optuna suggested the trial with this Ray id; it does not suggest sample 0, the base configuration."""
    return trial_id in search._ot_trials


def trials_of(found: ResultGrid) -> Sequence[Any]:
    """Ray Tune's trials, including those that a time budget stopped."""
    return list(found._experiment_analysis.trials)
