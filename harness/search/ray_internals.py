"""The private parts of Ray that this project relies on: all of them are here, and tests/test_search.py finds each.

ray is pinned below the next version that was not tried (pyproject.toml).
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
    """Ray's monitor ended a worker before the operating system would end a process."""


_task_failed = RayActorManager._actor_task_failed


def _fail_alone(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
    """Where its monitor has ended one worker, Ray Tune would end the whole sweep, siblings and all."""
    if isinstance(exception, OutOfMemoryError):
        exception = EndedForMemory(error_msg="its process was ended: the node's memory was running low")
    _task_failed(self, tracked_actor_task, exception)


RayActorManager._actor_task_failed = _fail_alone


def brackets_of(scheduler: AsyncHyperBandScheduler) -> Sequence[Any]:
    """ASHA's brackets of rungs: Ray restores them from its own pickles alone."""
    return list(scheduler._brackets)


def has_suggested(search: OptunaSearch, trial_id: str) -> bool:
    """Whether Optuna suggested that trial of Ray's; sample 0, the base, is nobody's suggestion."""
    return trial_id in search._ot_trials


def trials_of(found: ResultGrid) -> Sequence[Any]:
    """Ray Tune's trials, also those that a time budget stopped."""
    return list(found._experiment_analysis.trials)
