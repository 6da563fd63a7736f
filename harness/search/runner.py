"""Runs trials with Ray Tune on the devices of this machine or of a cluster.

Ray places trials, retries those that failed or whose process died, and calls scheduler and searcher. The run directory
decides which trials have ended: a worker process writes the records of trials that it finished, the driver those of
trials that were stopped or whose process died. So resuming a run needs no state of Ray's.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from harness.search.cluster import cluster, scratch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray and its dependencies announce their own future changes
    import ray
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler

    from harness.search.worker import TrialWorker, call_with_paths, own_paths

from harness.config import Resources, Search, Trial
from harness.run import gpus, system
from harness.run.directory import RunDirectory
from harness.run.progress import Progress
from harness.run.records import PlanChoice
from harness.run.storage import Json
from harness.search.allocation import Allocation
from harness.search.events import TrialEvents
from harness.search.plans import Placement, choose_plans
from harness.search.ray_internals import trials_of
from harness.search.searchers import InOrder, OptunaSamples, make_scheduler
from harness.search.trials import TrialGenerator, TrialSpec
from harness.search.watcher import Watcher
from harness.training.job import TrainingJob


def run_trials(
    trials: Sequence[TrialSpec],
    of: int,
    generator: TrialGenerator,
    run: RunDirectory,
    progress: Progress,
    *,
    scheduler: bool,
    seconds: float | None = None,
) -> None:
    """Run `trials`, the missing ones of a stage of `of` trials. `scheduler`: whether to use the configured one;
    `seconds`: time budget.

    The allocation depends on `of`, not on how many trials are missing: the number of threads, and so the exact results,
    are the same whether or not the run was interrupted.
    """
    with cluster(generator.resolved.config.resources) as nodes:
        runner = TrialRunner(generator, run, progress, Allocation.of(generator.resolved.config.resources, nodes, of))
        runner.choose_plans([spec.config for spec in trials], of)
        configs = (runner.worker_config(spec) for spec in trials)
        searcher = InOrder(configs, metric=runner.search.metric, mode=runner.search.mode)
        runner.fit(searcher, {spec.id: spec for spec in trials}, len(trials), scheduler, seconds)


def run_optuna(indices: Sequence[int], generator: TrialGenerator, run: RunDirectory, progress: Progress) -> None:
    """Run the samples with these indices as Optuna suggests them, given the results of the trials that have ended."""
    import optuna

    search, parameters = generator.search, generator.resolved.space.parameters
    specs: dict[str, TrialSpec] = {}
    with cluster(generator.resolved.config.resources) as nodes:
        allocation = Allocation.of(generator.resolved.config.resources, nodes, search.samples)
        runner = TrialRunner(generator, run, progress, allocation)
        runner.choose_plans([generator.trial("search", {}).config], search.samples)

        def make(changes: Json, index: int) -> Json:
            spec = generator.trial("search", changes, index=index)
            specs[spec.id] = spec
            return runner.worker_config(spec)

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        searcher = OptunaSamples(
            indices,
            make,
            parameters,
            metric=search.metric,
            mode=search.mode,
            # Each command creates a new sampler: with the same seed it would draw the same points again.
            seed=int(hashlib.sha256(f"{search.seed} {indices[0]}".encode()).hexdigest()[:8], 16),
        )
        for record in run.trials():
            value = getattr(record.metrics, search.metric)
            has_value = value is not None and record.status in ("finished", "stopped")
            if has_value and record.stage == "search" and set(record.parameters) == set(parameters):
                searcher.add_result(record.parameters, value)
        runner.fit(searcher, specs, len(indices), True, search.time_budget_seconds)


class TrialRunner:
    """Runs the trials of one stage on a cluster."""

    def __init__(self, generator: TrialGenerator, run: RunDirectory, progress: Progress, allocation: Allocation):
        self.generator, self.run, self.progress, self.allocation = generator, run, progress, allocation
        self.search: Search = generator.search
        self.resources: Resources = generator.resolved.config.resources
        self.plans: dict[str, PlanChoice] = {}

    def choose_plans(self, configs: Sequence[Trial], of: int) -> None:
        """Choose the execution plan of each architecture; a measurement runs with a trial's allocation."""

        def where_a_trial_runs(function: Callable[..., Json], *arguments: object) -> Json:
            request = self.allocation.request
            task = ray.remote(num_cpus=request["cpu"], num_gpus=request["gpu"], max_calls=1)(call_with_paths)
            return dict(ray.get(task.remote(own_paths(), function, *arguments)))

        machine = None
        if not self.resources.address:
            is_gpu = self.allocation.device == "cuda"
            machine = gpus.common_name() if is_gpu else system.environment().cpu
        at_once = min(of, self.allocation.at_once)
        place = Placement(self.allocation.device, self.allocation.threads, at_once, machine)
        self.plans = choose_plans(configs, of, self.run, place, self.progress, where_a_trial_runs)

    def worker_config(self, spec: TrialSpec) -> Json:
        """The configuration that TrialWorker gets for a trial."""
        job = TrainingJob(
            config=spec.config,
            data=self.generator.resolved.config.data,
            seed=spec.seed,
            folder=self.run.trial_folder(spec.id),
            fingerprint=self.generator.fingerprint,
            read_test=spec.read_test,
            device=self.allocation.device,
            plan=self.plans.get(spec.config.architecture),
            checkpoint_bytes=self.resources.checkpoint_gib * 2**30 / self.allocation.at_once,
            labels=spec.labels(),
        )
        how = {"threads": self.allocation.threads, "timeout": self.resources.timeout_seconds, "paths": own_paths()}
        return {"job": job.to_json(), **how}

    def fit(
        self, searcher: Any, specs: dict[str, TrialSpec], total: int, scheduler: bool, seconds: float | None
    ) -> None:
        """Run the `total` trials that the searcher hands out; `specs` holds each by id once it is handed out."""
        search = self.search
        epochs = self.generator.resolved.config.trial.epochs
        watcher = Watcher(specs, TrialEvents(total, self.run, self.progress, search.metric))
        with scratch() as temporary, self.progress.live():
            tuner = tune.Tuner(
                tune.with_resources(TrialWorker, self.allocation.request),
                tune_config=tune.TuneConfig(
                    metric=search.metric,
                    mode=search.mode,
                    search_alg=searcher,
                    scheduler=make_scheduler(search, epochs, self.run) if scheduler else FIFOScheduler(),
                    num_samples=total,
                    # Ray starts this many trials at once; without it, one after another.
                    max_concurrent_trials=self.resources.concurrency or self.allocation.at_once,
                    time_budget_s=seconds,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=str(temporary),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=self.resources.retries),
                    callbacks=[watcher],
                    verbose=0,
                ),
            )
            try:
                found = tuner.fit()
            except tune.TuneError as error:
                # Ray's error has only the text of what a callback raised, for instance that the disk is full.
                raise error.__context__ or error from None
            watcher.out_of_time(trials_of(found))
