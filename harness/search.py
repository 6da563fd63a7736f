"""Runs planned trials with Ray Tune on the devices of this machine or of a cluster.

Ray places trials, restarts those that failed or whose process died, and asks scheduler and searcher. What has ended is
decided by the run directory: a worker writes the record of the trial that it finished, this process the record of one
that was stopped or whose process died. So a restart depends on no state of Ray's.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness.cluster import cluster, scratch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray and its dependencies announce their own future changes
    import ray
    from ray import tune
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher
    from ray.tune.search.optuna import OptunaSearch

    from harness.worker import Worker

from harness import cli, gpus, results
from harness.config import Search, Trial
from harness.journal import Journal
from harness.plan import Planned, Planner
from harness.progress import Progress
from harness.share import Share
from tune_spaces import Choice, Integer, LogUniform, Uniform


class EndedForMemory(RayActorError):
    """Ray's monitor ended a worker before the system's would end something."""


_task_failed = RayActorManager._actor_task_failed


def _failed_alone(self: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
    """Where its monitor has ended one worker, Ray Tune would end the whole sweep, siblings and all."""
    if isinstance(exception, OutOfMemoryError):
        exception = EndedForMemory(error_msg="its process was ended: the node's memory was running low")
    _task_failed(self, tracked_actor_task, exception)


RayActorManager._actor_task_failed = _failed_alone


class NotPickled:
    """Ray pickles its parts to restore them itself; here the run directory restores, so there is nothing to keep."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Watcher(NotPickled, tune.Callback):
    """Passes what Ray says of its trials on to the journal."""

    def __init__(self, trials: dict[str, Planned], journal: Journal):
        self.trials, self.journal = trials, journal

    def planned(self, trial: Any) -> Planned:
        return self.trials[trial.config["job"]["labels"]["id"]]

    def on_step_begin(self, iteration, trials, **info):
        cli.check_stopped()
        self.journal.check_there()

    def on_trial_start(self, iteration, trials, trial, **info):
        self.journal.started(self.planned(trial))

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if not result["done"]:
            self.journal.reported(self.planned(trial), result)

    def on_trial_recover(self, iteration, trials, trial, **info):
        self.journal.retried(self.planned(trial), str(self._error(trial) or ""))

    def on_trial_complete(self, iteration, trials, trial, **info):
        planned, last = self.planned(trial), trial.last_result or {}
        if not last.get("recorded"):
            self.journal.stopped(planned, last, "asha")
        self.journal.ended(planned)

    def on_trial_error(self, iteration, trials, trial, **info):
        planned, error = self.planned(trial), self._error(trial)
        status = "oom" if isinstance(error, EndedForMemory) else "failed"
        self.journal.failed(planned, trial.last_result or {}, status, str(error or ""))
        self.journal.ended(planned)

    @staticmethod
    def _error(trial: Any) -> BaseException | None:
        with contextlib.suppress(OSError, TypeError):  # Ray's own getter looks where it has not put the file yet
            return ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        return None

    def out_of_time(self, tune_trials: Sequence[Any]) -> None:
        """Record what the time budget ended, of which Ray does not tell; what never began stays missing."""
        for trial in tune_trials:
            planned, last = self.planned(trial), trial.last_result or {}
            if self.journal.is_told(planned) or not (last.get("recorded") or "record" in last):
                continue
            if not last.get("recorded"):
                self.journal.stopped(planned, last, "time budget")
            self.journal.ended(planned)


class InOrder(NotPickled, Searcher):
    """Trials that are known beforehand, each handed out when there is room for it: Ray's own grid copies the whole list
    for each of them."""

    def __init__(self, configs: Iterator[dict[str, Any]], **options):
        super().__init__(**options)
        self._configs = configs

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        return next(self._configs, Searcher.FINISHED)

    def on_trial_complete(self, trial_id, result=None, error=False):
        pass

    def save(self, checkpoint_path):
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path):
        raise NotImplementedError("the run directory restores")


class OptunaSamples(NotPickled, OptunaSearch):
    """Optuna's suggestions as trials with the indices that are missing; sample 0 is the base, which nobody suggests."""

    def __init__(self, indices: Sequence[int], make, **options):
        super().__init__(**options)
        self._indices = list(indices)
        self._make = make

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if not self._indices:
            return None
        index = self._indices.pop(0)
        return self._make({} if index == 0 else super().suggest(trial_id), index)

    def save(self, checkpoint_path):
        Path(checkpoint_path).touch()

    def on_trial_result(self, trial_id, result):
        if trial_id in self._ot_trials:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id, result=None, error=False):
        if trial_id in self._ot_trials:
            super().on_trial_complete(trial_id, result, error)


def run_planned(
    trials: Sequence[Planned],
    of: int,
    planner: Planner,
    run: results.RunDirectory,
    progress: Progress,
    *,
    scheduler: bool,
) -> None:
    """Run these trials, all that is missing `of` so many. `scheduler`: whether the configured one may stop some.

    A trial's share of the machine follows from `of`: its threads, and with them its bits, are the same whether the
    run was interrupted or not.
    """
    known = {planned.id: planned for planned in trials}
    with cluster(planner.resolved.config.resources) as nodes:
        share = Share.of(planner.resolved.config.resources, nodes, of)
        configs = [planned.config for planned in trials]
        plans = _plans(configs, of, planner, run, share, progress)
        jobs = (_trial_config(planned, planner, run, share, plans) for planned in trials)
        searcher = InOrder(jobs, metric=planner.search.metric, mode=planner.search.mode)
        _fit(searcher, known, len(trials), planner, run, progress, share, scheduler)


def run_suggested(indices: Sequence[int], planner: Planner, run: results.RunDirectory, progress: Progress) -> None:
    """Run the samples with these indices as Optuna suggests them, told of the trials that have ended before."""
    import optuna

    search, parameters = planner.search, planner.resolved.space.parameters
    known: dict[str, Planned] = {}
    with cluster(planner.resolved.config.resources) as nodes:
        share = Share.of(planner.resolved.config.resources, nodes, search.samples)
        base = planner.trial("search", {}).config
        plans = _plans([base], search.samples, planner, run, share, progress)

        def make(changes: dict[str, Any], index: int) -> dict[str, Any]:
            planned = planner.trial("search", changes, index=index)
            known[planned.id] = planned
            return _trial_config(planned, planner, run, share, plans)

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        searcher = OptunaSamples(
            indices,
            make,
            space={key: _distribution(domain) for key, domain in parameters.items()},
            metric=search.metric,
            mode=search.mode,
            # Optuna's sampler begins anew with each command: the same seed would draw the same points again.
            seed=int(hashlib.sha256(f"{search.seed} {indices[0]}".encode()).hexdigest()[:8], 16),
        )
        for record in run.trials():
            value = record["metrics"].get(search.metric)
            known_value = value is not None and record["status"] in ("finished", "stopped")
            if known_value and record["stage"] == "search" and set(record["parameters"]) == set(parameters):
                searcher.add_evaluated_point(record["parameters"], value)
        _fit(searcher, known, len(indices), planner, run, progress, share, True)


def _fit(searcher, known, total, planner, run, progress, share, scheduler) -> None:
    search = planner.search
    watcher = Watcher(known, Journal(total, run, progress, search.metric))
    with scratch() as temporary, progress.live():
        tuner = tune.Tuner(
            tune.with_resources(Worker, share.request),
            tune_config=tune.TuneConfig(
                metric=search.metric,
                mode=search.mode,
                search_alg=searcher,
                scheduler=make_scheduler(search, planner.resolved.config.trial.epochs, run)
                if scheduler
                else FIFOScheduler(),
                num_samples=total,
                # As many as may run also start at once.
                max_concurrent_trials=planner.resolved.config.resources.concurrency or share.at_once,
                time_budget_s=search.time_budget_seconds,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(temporary),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=planner.resolved.config.resources.retries),
                callbacks=[watcher],
                verbose=0,
            ),
        )
        try:
            found = tuner.fit()
        except tune.TuneError as error:
            # Of what the journal raised, a full disk say, Ray keeps the text alone.
            raise error.__context__ or error from None
        watcher.out_of_time(found._experiment_analysis.trials)


def make_scheduler(search: Search, epochs: int, run: results.RunDirectory) -> TrialScheduler:
    """The configured scheduler, told of the trials of the search that have ended before.

    A trial that goes on from a checkpoint reports its earlier validations itself.
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
    (bracket,) = scheduler._brackets  # Ray offers no other way than its own pickles
    sign = 1.0 if search.mode == "max" else -1.0
    for record in run.trials():
        has_history = (run.trial_folder(record["id"]) / results.HISTORY).is_file()
        if record["stage"] == "search" and results.is_done(record) and has_history:
            for row in run.history(record["id"]).to_dict("records"):
                bracket.on_result(SimpleNamespace(trial_id=record["id"]), row["epoch"], sign * row[search.metric])
    return scheduler


def _plans(
    configs: Sequence[Trial], of: int, planner: Planner, run: results.RunDirectory, share: Share, progress: Progress
) -> dict[str, dict[str, Any]]:
    """How the trials of each architecture run, what is to be measured measured in the place of a trial."""
    from harness import fastest

    def in_the_place_of_a_trial(function, *arguments):
        task = ray.remote(num_cpus=share.request["cpu"], num_gpus=share.request["gpu"], max_calls=1)(function)
        return ray.get(task.remote(*arguments))

    machine = None
    if not planner.resolved.config.resources.address:
        machine = gpus.common_name() if share.device == "cuda" else results.environment()["cpu"]
    place = fastest.Place(share.device, share.threads, min(of, share.at_once), machine)
    return fastest.plans_of_run(configs, of, run, place, progress, in_the_place_of_a_trial)


def _trial_config(
    planned: Planned,
    planner: Planner,
    run: results.RunDirectory,
    share: Share,
    plans: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    from harness.trial import Job

    job = Job(
        config=planned.config,
        data=planner.resolved.config.data,
        seed=planned.seed,
        folder=run.trial_folder(planned.id),
        fingerprint=planner.fingerprint,
        read_test=planned.read_test,
        device=share.device,
        plan=plans.get(planned.config.architecture, {}),
        checkpoint_bytes=planner.resolved.config.resources.checkpoint_gib * 2**30 / share.at_once,
        labels=planned.labels(),
    )
    timeout = planner.resolved.config.resources.timeout_seconds
    return {"job": job.to_json(), "threads": share.threads, "timeout": timeout}


def _distribution(domain):
    from optuna import distributions

    if isinstance(domain, Choice):
        return distributions.CategoricalDistribution(list(domain.values))
    if isinstance(domain, Integer):
        return distributions.IntDistribution(domain.low, domain.high)
    assert isinstance(domain, Uniform | LogUniform)
    return distributions.FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))
