"""Runs planned trials with Ray Tune on the devices of this machine or of a cluster; the only module that imports ray.

Ray places trials, restarts those whose process died, and asks scheduler and searcher. What has ended is decided by the
run directory: a worker writes the record of the trial that it finished, this process the record of one that was stopped
or whose process died. So a restart depends on no state of Ray's.
"""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints tables even where verbose=0
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # CPU trials see no GPU

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray and its dependencies announce their own future changes
    import ray
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
    from ray.tune.search import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

from harness import results
from harness.config import Resources, Search
from harness.errors import BadInput
from harness.plan import Planned, Planner
from harness.progress import Progress, duration
from tune_spaces import Choice, Integer, LogUniform, Uniform


class Worker(tune.Trainable):
    """Runs one trial after another in a process that stays: a step goes on to the next validation."""

    loop: Any = None

    def setup(self, config: dict[str, Any]) -> None:
        import torch

        from harness.trial import Job, training

        job = Job.from_json(config["job"])
        assert job.folder is not None
        run = job.folder.parent.parent
        if not (run / "run.json").is_file():
            raise FileNotFoundError(f"run={run}: not visible on node {os.uname().nodename}; give a shared folder")
        torch.set_num_threads(config["threads"])
        self.loop = training(job)
        self.row: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        try:
            self.row = next(self.loop)
        except StopIteration as end:
            record = end.value
            nothing = {"epoch": self.row.get("epoch", 0.0), "val_accuracy": float("nan"), "val_loss": float("nan")}
            last = {**nothing, **record["metrics"]}
            return {**last, "epoch": last.get("epochs", last["epoch"]), "status": record["status"], "done": True}
        return self.row

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        if self.loop is not None:
            self.loop.close()


class NotPickled:
    """Ray pickles its parts to restore them itself; here the run directory restores, so there is nothing to keep."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Watcher(NotPickled, tune.Callback):
    """Tells what happens to trials and writes the records that no worker can write."""

    def __init__(
        self, trials: dict[str, Planned], total: int, run: results.RunDirectory, progress: Progress, metric: str
    ):
        self.trials, self.total, self.run, self.progress, self.metric = trials, total, run, progress, metric
        self.started = time.monotonic()
        self.shares: dict[str, float] = {}
        self.best: float | None = None

    def on_trial_start(self, iteration, trials, trial, **info):
        planned = self._planned(trial)
        self.shares[planned.id] = 0.0
        self.progress.line(f"trial {planned.id} {describe(planned)}: started")

    def on_trial_result(self, iteration, trials, trial, result, **info):
        planned = self._planned(trial)
        if "step" not in result:
            return
        self.shares[planned.id] = min(1.0, result["epoch"] / planned.config.epochs)
        value = result[self.metric]
        better = max if self.metric == "val_accuracy" else min
        self.best = value if self.best is None else better(self.best, value)
        if planned.config.epochs * planned.config.validations_per_epoch <= 40 or result["epoch"] == int(
            result["epoch"]
        ):
            self.progress.status(
                f"{self._summary()}; {planned.id} epoch {result['epoch']:.1f}/{planned.config.epochs}: "
                f"validation {result['val_accuracy']:.4f}"
            )

    def on_trial_complete(self, iteration, trials, trial, **info):
        planned = self._planned(trial)
        folder = self.run.trial_folder(planned.id)
        if not (folder / results.TRIAL).is_file():
            self._write_stopped(planned, trial, "asha")
        self._ended(planned)

    def on_trial_error(self, iteration, trials, trial, **info):
        planned = self._planned(trial)
        folder = self.run.trial_folder(planned.id)
        error = trial.get_pickled_error() if trial.num_failures else None
        reason = str(error).strip().splitlines()[0] if error else "its process died"
        if trial.error_file and Path(trial.error_file).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(trial.error_file, folder / results.ERROR)
        results.write_trial(folder, self._record(planned, trial, "failed") | {"error": reason})
        self._ended(planned)

    def stop_unfinished(self, tune_trials: Sequence[Any]) -> None:
        """Records of trials that the time budget ended."""
        for trial in tune_trials:
            planned = self._planned(trial)
            if trial.last_result and not (self.run.trial_folder(planned.id) / results.TRIAL).is_file():
                self._write_stopped(planned, trial, "time budget")

    def _write_stopped(self, planned: Planned, trial: Any, reason: str) -> None:
        record = self._record(planned, trial, "stopped")
        results.write_trial(self.run.trial_folder(planned.id), record | {"stop_reason": reason})

    def _record(self, planned: Planned, trial: Any, status: str) -> dict[str, Any]:
        last = trial.last_result or {}
        names = ("val_accuracy", "val_loss", "train_accuracy", "train_loss")
        metrics = {name: last[name] for name in names if name in last} | {"epochs": last.get("epoch", 0.0)}
        return {
            **planned.labels(),
            "seed": planned.seed,
            "config": planned.config.model_dump(mode="json"),
            "status": status,
            "metrics": metrics,
            "timing": {"wall_seconds": last.get("time_total_s", 0.0)},
            "environment": results.environment(),
        }

    def _ended(self, planned: Planned) -> None:
        import json

        record = json.loads((self.run.trial_folder(planned.id) / results.TRIAL).read_text())
        self.shares[planned.id] = 1.0
        self.run.write_trials_csv()
        metrics, status = record["metrics"], record["status"]
        text = f"trial {planned.id} {describe(planned)}: {status}"
        if status == "stopped":
            text += f" by {record['stop_reason']} at epoch {metrics['epochs']:g}"
        if "val_accuracy" in metrics and status in ("finished", "stopped"):
            text += f", validation {metrics['val_accuracy']:.4f}"
        if "test_accuracy" in metrics:
            text += f", test {metrics['test_accuracy']:.4f}"
        if "error" in record:
            options = " ".join(f"{k}={v}" for k, v in planned.parameters.items())
            text += f" ({options or 'base configuration'}): {record['error']}"
        self.progress.line(f"{text}, {duration(record['timing']['wall_seconds'])}")
        self.progress.status(self._summary())

    def _planned(self, trial: Any) -> Planned:
        return self.trials[trial.config["job"]["labels"]["id"]]

    def _summary(self) -> str:
        done = sum(share == 1 for share in self.shares.values())
        share = sum(self.shares.values()) / self.total
        elapsed = time.monotonic() - self.started
        left = f", about {duration(elapsed / share - elapsed)} left" if 0 < share < 1 else ""
        best = "" if self.best is None else f", best {self.metric} {self.best:.4f}"
        return f"{done} of {self.total} trials done, {len(self.shares) - done} running{best}{left}"


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
        configs = [_trial_config(planned, planner, run, share) for planned in trials]
        space = {"job": tune.grid_search([c["job"] for c in configs]), "threads": share.threads}
        _fit(space, BasicVariantGenerator(), 1, known, len(trials), planner, run, progress, share, scheduler)


def run_suggested(indices: Sequence[int], planner: Planner, run: results.RunDirectory, progress: Progress) -> None:
    """Run the samples with these indices as Optuna suggests them, told of the trials that have ended before."""
    import optuna

    search, parameters = planner.search, planner.resolved.space.parameters
    known: dict[str, Planned] = {}
    with cluster(planner.resolved.config.resources) as nodes:
        share = Share.of(planner.resolved.config.resources, nodes, search.samples)

        def make(changes: dict[str, Any], index: int) -> dict[str, Any]:
            planned = planner.trial("search", changes, index=index)
            known[planned.id] = planned
            return _trial_config(planned, planner, run, share)

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        searcher = OptunaSamples(
            indices,
            make,
            space={key: _distribution(domain) for key, domain in parameters.items()},
            metric=search.metric,
            mode=search.mode,
            seed=search.seed,
        )
        for record in run.trials():
            value = record["metrics"].get(search.metric)
            if record["stage"] == "search" and set(record["parameters"]) == set(parameters) and value is not None:
                searcher.add_evaluated_point(record["parameters"], value)
        _fit({}, searcher, len(indices), known, len(indices), planner, run, progress, share, True)


def _fit(space, searcher, samples, known, total, planner, run, progress, share, scheduler) -> None:
    search = planner.search
    watcher = Watcher(known, total, run, progress, search.metric)
    temporary = Path(tempfile.mkdtemp(prefix="harness-tune-"))
    try:
        with progress.live():
            found = tune.Tuner(
                tune.with_resources(Worker, share.request),
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric=search.metric,
                    mode=search.mode,
                    search_alg=searcher,
                    scheduler=_scheduler(search, planner) if scheduler else FIFOScheduler(),
                    num_samples=samples,
                    max_concurrent_trials=planner.resolved.config.resources.concurrency,
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
            ).fit()
        watcher.stop_unfinished(found._experiment_analysis.trials)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _scheduler(search: Search, planner: Planner):
    if search.scheduler == "fifo":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        max_t=planner.resolved.config.trial.epochs,
        grace_period=search.asha.grace_epochs,
        reduction_factor=search.asha.reduction_factor,
        stop_last_trials=False,
    )


def _trial_config(planned: Planned, planner: Planner, run: results.RunDirectory, share: "Share") -> dict[str, Any]:
    from harness.trial import Job

    job = Job(
        config=planned.config,
        data=planner.resolved.config.data,
        seed=planned.seed,
        folder=run.trial_folder(planned.id),
        read_test=planned.read_test,
        device=share.device,
        labels=planned.labels(),
    )
    return {"job": job.to_json(), "threads": share.threads}


def _distribution(domain):
    from optuna import distributions

    if isinstance(domain, Choice):
        return distributions.CategoricalDistribution(list(domain.values))
    if isinstance(domain, Integer):
        return distributions.IntDistribution(domain.low, domain.high)
    assert isinstance(domain, Uniform | LogUniform)
    return distributions.FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))


class Share:
    """What one trial is given: CPUs (its threads) and GPUs."""

    def __init__(self, cpus: float, gpus: float):
        self.request = {"cpu": cpus, "gpu": gpus}
        self.threads = max(1, int(cpus))
        self.device = "cuda" if gpus else "cpu"

    @classmethod
    def of(cls, resources: Resources, nodes: Sequence[dict[str, float]], trials: int) -> "Share":
        """As asked; else a GPU each where there are any, and the CPUs divided among the trials that run at once.

        BadInput where no node has as much: Ray would wait for one for ever.
        """
        most_cpus = max(node.get("CPU", 0) for node in nodes)
        most_gpus = max(node.get("GPU", 0) for node in nodes)
        gpus = resources.gpus_per_trial
        if gpus is None:
            gpus = 1.0 if most_gpus else 0.0
        if gpus > most_gpus:
            raise BadInput(f"resources.gpus_per_trial={gpus:g}: no node has more than {most_gpus:g} GPUs; ask for less")
        at_once = min(trials, resources.concurrency or trials)
        if gpus:
            at_once = min(at_once, max(1, int(sum(node.get("GPU", 0) for node in nodes) / gpus)))
        share = sum(node.get("CPU", 0) for node in nodes) // max(at_once, 1)
        cpus = resources.cpus_per_trial or min(most_cpus, max(1.0, share))
        if cpus > most_cpus:
            raise BadInput(f"resources.cpus_per_trial={cpus:g}: no node has more than {most_cpus:g} CPUs; ask for less")
        return cls(cpus, gpus)


@contextlib.contextmanager
def cluster(resources: Resources) -> Iterator[list[dict[str, float]]]:
    """Join the cluster at `resources.address`, or start one on this machine and stop it again; its nodes' resources."""
    own = not ray.is_initialized()
    folder = tempfile.mkdtemp(
        prefix="harness-ray-", dir=None if resources.address else "/tmp"
    )  # sockets need short paths
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        if own and resources.address:
            try:
                ray.init(address=resources.address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:
                raise BadInput(
                    f"resources.address={resources.address}: {error}; start a cluster with `ray start --head`, "
                    "or leave the address (and RAY_ADDRESS) out"
                ) from error
        elif own:
            cores = results.environment()["cores"]
            ray.init(
                num_cpus=cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=256 * 2**20,
                _temp_dir=folder,
            )
        signal.signal(signal.SIGTERM, terminate)  # ray puts its own handler there
        for name in ("ray", "ray.tune"):  # what fails is told by Watcher, once and in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if own:
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def describe(planned: Planned) -> str:
    """For people: stage, variant or sample, seed."""
    what = planned.variant or f"sample {planned.index}"
    return f"({planned.stage}, {what}, seed {planned.seed})"
