"""Runs planned trials with Ray Tune on the devices of this machine or of a cluster; the only module that imports ray.

Ray places trials, restarts those whose process died, and asks scheduler and searcher. What has ended is decided by the
run directory: a worker writes the record of the trial that it finished, this process the record of one that was stopped
or whose process died. So a restart depends on no state of Ray's.
"""

import contextlib
import faulthandler
import gc
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
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
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean what they meant to the user
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # CPU trials see no GPU

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray and its dependencies announce their own future changes
    import ray
    from ray import tune
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
    from ray.tune.search import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

import psutil

from harness import checkpoint, cli, results
from harness.config import Resources, Search, Trial
from harness.errors import BadInput
from harness.journal import Journal
from harness.ledger import Ledger
from harness.plan import Planned, Planner
from harness.progress import Progress
from harness.share import Share
from tune_spaces import Choice, Integer, LogUniform, Uniform


class Worker(tune.Trainable):
    """Runs one trial after another in a process that stays: a step goes on to the next validation."""

    loop: Any = None

    def setup(self, config: dict[str, Any]) -> None:
        # What a process does before its first trial belongs to that one.
        age = time.time() - psutil.Process().create_time()
        ledger = Ledger("worker start", time.perf_counter() - age)
        ledger.enter("imports")
        gc.disable()  # what imports make lasts: collecting in between takes a fifth of their time
        import torch._dynamo  # noqa: F401  which every optimiser imports

        from harness import execution

        execution.prepare_process()
        gc.freeze()
        gc.enable()
        self.start(config, ledger)

    def start(self, config: dict[str, Any], ledger: Ledger) -> None:
        import torch

        from harness.trial import Job, training

        job = Job.from_json(config["job"])
        assert job.folder is not None
        run = job.folder.parent.parent
        if not (run / "run.json").is_file():
            raise FileNotFoundError(f"run={run}: not visible on node {os.uname().nodename}; give a shared folder")
        torch.set_num_threads(config["threads"])
        (job.folder / results.ERROR).unlink(missing_ok=True)  # of a process before
        self.ledger, self.folder, self.timeout = ledger, job.folder, config["timeout"]
        self.loop = training(job, ledger)
        ledger.enter("idle")

    def step(self) -> dict[str, Any]:
        try:
            with _ending_where_it_hangs(self.folder, self.timeout):
                row, record = next(self.loop)
            return {**row, "record": {name: record[name] for name in ("metrics", "timing", "environment")}}
        except StopIteration as end:
            metrics, finished = end.value["metrics"], end.value["status"] == "finished"
            value = {name: metrics[name] if finished else float("nan") for name in ("val_accuracy", "val_loss")}
            return {"epoch": metrics.get("epochs", 0.0), **value, "recorded": True, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.start(new_config, Ledger("queue", self.ledger.mark))
        return True

    def cleanup(self) -> None:
        if self.loop is not None:
            self.loop.close()


@contextlib.contextmanager
def _ending_where_it_hangs(folder: Path, seconds: float | None) -> Iterator[None]:
    """End this process where what is within takes longer, and say in the trial's folder what it was at."""

    def end():
        with tempfile.TemporaryFile("w+") as stacks:
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            said = f"timed out: no validation in {seconds:g} s (resources.timeout_seconds)\n\n{stacks.read()}"
        try:
            checkpoint.write_atomically(folder / results.ERROR, said)
        finally:
            os._exit(1)

    timer = threading.Timer(seconds, end) if seconds is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


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

    def on_trial_start(self, iteration, trials, trial, **info):
        self.journal.started(self.planned(trial))

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if not result["done"]:
            self.journal.reported(self.planned(trial), result)

    def on_trial_recover(self, iteration, trials, trial, **info):
        self.journal.retried(self.planned(trial))

    def on_trial_complete(self, iteration, trials, trial, **info):
        planned, last = self.planned(trial), trial.last_result or {}
        if not last.get("recorded"):
            self.journal.stopped(planned, last, "asha")
        self.journal.ended(planned)

    def on_trial_error(self, iteration, trials, trial, **info):
        planned = self.planned(trial)
        error = None
        with contextlib.suppress(OSError, TypeError):  # Ray's own getter looks where it has not put the file yet
            error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        status = "oom" if isinstance(error, ray.exceptions.OutOfMemoryError) else "failed"
        self.journal.failed(planned, trial.last_result or {}, status, str(error or ""))
        self.journal.ended(planned)

    def out_of_time(self, tune_trials: Sequence[Any]) -> None:
        """Record what the time budget ended, of which Ray does not tell; what never began stays missing."""
        for trial in tune_trials:
            planned, last = self.planned(trial), trial.last_result or {}
            if self.journal.is_told(planned) or not (last.get("recorded") or "record" in last):
                continue
            if not last.get("recorded"):
                self.journal.stopped(planned, last, "time budget")
            self.journal.ended(planned)


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
    concurrency = planner.resolved.config.resources.concurrency
    with cluster(planner.resolved.config.resources) as nodes:
        share = Share.of(planner.resolved.config.resources, nodes, of)
        configs = [planned.config for planned in trials]
        plans = _plans(configs, of, planner, run, share, progress)
        jobs = [_trial_config(planned, planner, run, share, plans)["job"] for planned in trials]
        space = {**_trial_config(trials[0], planner, run, share, plans), "job": tune.grid_search(jobs)}
        _fit(
            space,
            BasicVariantGenerator(max_concurrent=concurrency or 0),
            1,
            known,
            len(trials),
            planner,
            run,
            progress,
            share,
            scheduler,
        )


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
        _fit({}, searcher, len(indices), known, len(indices), planner, run, progress, share, True)


def _fit(space, searcher, samples, known, total, planner, run, progress, share, scheduler) -> None:
    search = planner.search
    watcher = Watcher(known, Journal(total, run, progress, search.metric))
    with scratch() as temporary, progress.live():
        tuner = tune.Tuner(
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
        )
        try:
            found = tuner.fit()
        except tune.TuneError as error:
            # Of what the journal raised, a full disk say, Ray keeps the text alone.
            raise error.__context__ or error from None
        watcher.out_of_time(found._experiment_analysis.trials)


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


def _plans(
    configs: Sequence[Trial], of: int, planner: Planner, run: results.RunDirectory, share: Share, progress: Progress
) -> dict[str, dict[str, Any]]:
    """How the trials of each architecture run, what is to be measured measured in the place of a trial."""
    from harness import fastest

    def in_the_place_of_a_trial(function, *arguments):
        task = ray.remote(num_cpus=share.request["cpu"], num_gpus=share.request["gpu"], max_calls=1)(function)
        return ray.get(task.remote(*arguments))

    here = share.device == "cpu" and not planner.resolved.config.resources.address
    place = fastest.Place(share.device, share.threads, min(of, share.at_once), here)
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


@contextlib.contextmanager
def cluster(resources: Resources) -> Iterator[list[dict[str, float]]]:
    """Join the cluster at `resources.address`, or start one on this machine and stop it again; its nodes' resources."""
    own = not ray.is_initialized()
    terminate = signal.getsignal(signal.SIGTERM)
    with scratch() as folder, contextlib.ExitStack() as stack:
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
                _temp_dir=str(folder),
            )
            command = [sys.executable, "-m", "harness.guard", str(os.getpid()), str(folder)]
            guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            stack.callback(guard.communicate, b"ended")
        signal.signal(signal.SIGTERM, terminate)  # ray puts its own handler there
        for name in ("ray", "ray.tune"):  # what fails is told by Watcher, once and in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
        finally:
            if own:
                ray.shutdown()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what Ray writes, gone at the end; what killed processes left goes at the beginning."""
    from filelock import FileLock, Timeout

    top = Path("/tmp")  # sockets need short paths
    for left in top.glob("harness-ray-*.lock"):
        with contextlib.suppress(OSError, Timeout), FileLock(left, timeout=0):
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink(missing_ok=True)
    folder = top / f"harness-ray-{uuid.uuid4().hex[:12]}"
    with FileLock(folder.with_suffix(".lock")) as held:
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(held.lock_file).unlink(missing_ok=True)
