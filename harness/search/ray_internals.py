"""All private parts of Ray that this project relies on; tests/test_search.py checks that each exists.

pyproject.toml pins ray below the first untested version.
"""

import contextlib
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray and its dependencies announce their own future changes
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.tune import ResultGrid
    from ray.tune.execution import class_cache
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


@contextlib.contextmanager
def private_cluster(folder: Path) -> Iterator[None]:
    """The context of a cluster of this machine alone, around ray.init and ray.shutdown: Ray binds to the loopback
    interface, wants a token that only `folder` (of mode 0700) holds, and writes no AWS_* variables to its logs. Trials
    have them anyway: on one machine they inherit the environment.

    Ray reads these settings when it is imported, so its own copies are changed too. 127.0.0.1 as the node's address
    would not do: Ray resolves it to that of another interface.
    """
    token = folder / "token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_AUTH_TOKEN": None,  # it would be preferred to the path
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # for child processes; there the loopback interface is the default
    }
    before = {name: os.environ.get(name) for name in ours}
    enabled, sent = ray_constants.ENABLE_RAY_CLUSTER, class_cache.ENV_VARS_TO_PROPAGATE
    _set_environment(ours)
    ray_constants.ENABLE_RAY_CLUSTER = False
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in sent if not name.startswith("AWS_")}
    _read_settings_again()
    try:
        yield
    finally:
        _set_environment(before)
        ray_constants.ENABLE_RAY_CLUSTER, class_cache.ENV_VARS_TO_PROPAGATE = enabled, sent
        _read_settings_again()


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _read_settings_again() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
