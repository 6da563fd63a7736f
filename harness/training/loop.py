"""Training one trial: the loop. It knows neither Ray nor the command line.

    from harness import Data, Trial, train
    record = train(Trial(architecture="baseline"), Data(name="digits"), callbacks=[print])

`training_loop` is a generator that yields a row at each validation, so that its driver can stop between rows;
`train_job` runs it to its end. On a CPU the same job gives bitwise equal results, also when it resumes from a
checkpoint: all random draws of an epoch follow from the trial's seed and the epoch's number.
"""

import contextlib
import math
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping

import torch

from harness.config import Trial
from harness.data.augmentation import Draws
from harness.run import checkpoints, gpus, storage
from harness.run.records import (
    ERROR_FILE,
    WEIGHTS_FILE,
    HistoryRow,
    Metrics,
    Timing,
    TrialEnvironment,
    TrialRecord,
    write_history,
    write_trial,
)
from harness.training import execution
from harness.training.compilation import forget_compiled
from harness.training.evaluation import evaluate_test, record_test
from harness.training.job import TrainingJob
from harness.training.network import load_tensors, own_tensors
from harness.training.schedules import learning_rate_factor
from harness.training.setup import TrainingSetup, derive, set_up, untrained_network
from harness.training.timers import Timers


class Diverged(ArithmeticError):
    """The loss is not a finite number."""


def train_job(job: TrainingJob, report: Callable[[HistoryRow], object] | None = None) -> TrialRecord:
    """Train to the end; `report` is called with each row but the last. Returns the record, also in trial.json."""
    loop = training_loop(job)
    while True:
        try:
            row, _ = next(loop)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if report is not None:
            report(row)


Loop = Generator[tuple[HistoryRow, TrialRecord], None, TrialRecord]


def training_loop(job: TrainingJob, timers: Timers | None = None) -> Loop:
    """Yields at each validation the row of the history and the record so far; returns the final record.

    A job that resumes from a checkpoint in its folder first yields the rows before that checkpoint again. `timers`:
    already hold the time that the trial took before, such as starting its process. Failures are returned as records:
    status `failed`, `oom` or `diverged`, the traceback of the first two in error.txt. The only exceptions that
    propagate are those outside `Exception`, such as GeneratorExit when the driver closes the loop.
    """
    timers = timers or Timers()
    history: list[HistoryRow] = []
    record = TrialRecord.model_validate(
        {**job.labels, "seed": job.seed, "config": job.config.model_dump(mode="json"), "status": "finished"}
    )
    record.metrics, record.timing, record.environment = Metrics(), Timing(), TrialEnvironment()
    try:
        try:
            yield from _timed(job, record, history, timers)
        except Exception as error:
            if not is_of_compiler(error):
                raise
            # The cache of compiled code may be corrupt, left so by another process: empty it and train once more.
            forget_compiled()
            history.clear()
            record.metrics, record.compiled_anew = Metrics(), _first_line(error)
            yield from _timed(job, record, history, timers)
    except Diverged as error:
        record.status, record.error = "diverged", str(error)
    except Exception as error:
        record.status, record.error = "oom" if is_out_of_memory(error) else "failed", _first_line(error)
        if job.folder is not None:
            storage.write_atomically(job.folder / ERROR_FILE, traceback.format_exc())
    timers.enter("checkpoint")
    if job.folder is not None:
        write_history(job.folder, history)
    timers.book(record.timing)
    if job.folder is not None:
        record = write_trial(job.folder, record)
        if record.status in ("finished", "diverged"):
            checkpoints.remove_checkpoints(job.folder)
    return record


def _timed(
    job: TrainingJob, record: TrialRecord, history: list[HistoryRow], timers: Timers
) -> Iterator[tuple[HistoryRow, TrialRecord]]:
    """The items of `training_loop`; time until the driver asks for the next one is booked as idle."""
    for row in _train(job, record, history, timers):
        timers.enter("idle")
        timers.book(record.timing)
        yield row, record
        timers.enter("train")


def _train(job: TrainingJob, record: TrialRecord, history: list[HistoryRow], timers: Timers) -> Iterator[HistoryRow]:
    """The training itself: set up, resume, train an epoch, validate, record, finish."""
    trial, setup = job.config, set_up(job, record, timers)
    step, network, device = setup.step, setup.step.network, setup.device
    steps, total_steps = setup.steps_per_epoch, trial.epochs * setup.steps_per_epoch
    kept, images_trained, stopped_early = KeptWeights(trial), 0, False

    # Resume: the rows before the newest checkpoint are yielded again.
    timers.enter("checkpoint")
    seconds_before = 0.0  # training time before the checkpoint
    if (saved := setup.checkpointer.newest(record)) is not None:
        step.restore(saved.step_tensors(), saved.scaler)
        kept.weights = {name: tensor.to(device) for name, tensor in saved.kept_tensors().items()}
        seconds_before = saved.history[-1]["seconds"]
        if job.folder is not None:
            write_history(job.folder, saved.history)  # the driver may stop while these rows are yielded again
        for row in saved.history:
            history.append(row)
            kept.offer(row)
            for callback in job.callbacks:
                callback(row)
            record.metrics, record.timing = kept.metrics(row, setup), Timing.model_validate(saved.timing)
            yield row

    first_step = True
    for epoch in range(round(history[-1]["epoch"]) if history else 0, trial.epochs):
        # Train an epoch: its order, augmentation and dropout follow from the seed and its number.
        timers.enter("train")
        draws = Draws.of(setup.training.rows, trial, derive(job.seed, "batches", epoch))
        torch.manual_seed(derive(job.seed, "dropout", epoch))
        network.train()
        sums, seen = torch.zeros(2, device=device), 0
        for number in range(steps):
            done = epoch * steps + number
            rate = trial.optimizer.lr * learning_rate_factor(trial.schedule, done, total_steps, steps)
            with _first(setup, timers) if first_step else contextlib.nullcontext():
                sums += step(setup.training, draws.batch(number, trial.batch_size), rate)
            first_step, seen = False, seen + trial.batch_size
            if number + 1 not in setup.validate_at:
                continue

            # Validate.
            train_loss, train_accuracy = (sums / seen).tolist()  # waits for the device
            timers.enter("validate")
            images_trained += seen
            val_loss, val_accuracy = setup.evaluate(setup.validation, setup.plan.precision)
            timers.enter("checkpoint")
            row = HistoryRow(
                epoch=epoch + (number + 1) / steps,
                step=done + 1,
                train_loss=train_loss,
                train_accuracy=train_accuracy,
                val_loss=val_loss,
                val_accuracy=val_accuracy,
                lr=rate,
                seconds=seconds_before + timers.of("compile") + timers.of("train") + timers.of("validate"),
            )

            # Record: history, kept weights, early stop, checkpoint.
            history.append(row)
            if job.folder is not None:
                write_history(job.folder, history)
            if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                raise Diverged(f"loss {train_loss} in training, {val_loss} in validation at step {done + 1}")
            for callback in job.callbacks:
                callback(row)
            if kept.offer(row):
                kept.weights = {name: tensor.detach().clone() for name, tensor in own_tensors(network).items()}
            record.metrics = kept.metrics(row, setup)
            _record_speed(record, timers, images_trained, trial.batch_size)
            for name, size in gpus.peak_memory(device).items():
                setattr(record.environment, name, size)
            stopped_early = trial.early_stop is not None and oldest_is_lowest(history, trial.early_stop)
            if stopped_early or done + 1 == total_steps:
                break
            if number + 1 == steps:
                setup.checkpointer.save(epoch + 1, step, kept.weights, history, record)
            yield row
            sums.zero_()
            seen = 0
            network.train()
        if stopped_early:
            break

    _finish(job, record, kept, setup, timers)


@contextlib.contextmanager
def _first(setup: TrainingSetup, timers: Timers) -> Iterator[None]:
    """Context of the first step, which may compile or capture; that time is booked as `compile`."""
    if not (setup.plan.traces or setup.plan.captured):
        yield
        return
    timers.enter("compile")
    with execution.compiling(setup.plan, setup.shape):
        yield
    timers.enter("train")


def _record_speed(record: TrialRecord, timers: Timers, images_trained: int, batch_size: int) -> None:
    # The first step's images count only where its time counts as training.
    timed = images_trained - (batch_size if timers.of("compile") else 0)
    record.timing = Timing(
        train_seconds=timers.of("train"),
        validate_seconds=timers.of("validate"),
        images_per_second=timed / timers.of("train") if timed else 0.0,
    )


def _finish(job: TrainingJob, record: TrialRecord, kept: "KeptWeights", setup: TrainingSetup, timers: Timers) -> None:
    """Evaluate the kept weights on the test split where the job says so, and write them."""
    record.kept_epoch = kept.row["epoch"] if kept.row else None
    if job.read_test:
        timers.enter("validate")
        plain = untrained_network(job, setup.data, restoring=True)
        load_tensors(plain, kept.weights)
        fingerprint = setup.data.fingerprint
        loss, correct = evaluate_test(plain, job.config, setup.device, setup.test, fingerprint)
        timers.enter("checkpoint")
        record_test(job.folder, record, loss, correct)
    if job.network is not None:
        load_tensors(job.network, kept.weights)
        job.network.eval()
    if job.folder is not None:
        record.weights_sha256 = checkpoints.save_weights(job.folder / WEIGHTS_FILE, kept.weights)


class KeptWeights:
    """The kept weights of a trial and the row of their validation: the most accurate one, or the last."""

    def __init__(self, trial: Trial):
        self.keep = trial.keep
        self.row: HistoryRow | None = None
        self.weights: Mapping[str, torch.Tensor] = {}

    def offer(self, row: HistoryRow) -> bool:
        """Whether to keep the weights of this validation."""
        better = self.row is None or self.keep == "last" or row["val_accuracy"] > self.row["val_accuracy"]
        if better:
            self.row = row
        return better

    def metrics(self, last: HistoryRow, setup: TrainingSetup) -> Metrics:
        """Metrics of the kept weights, after training up to the `last` row."""
        assert self.row is not None
        return Metrics(
            val_accuracy=self.row["val_accuracy"],
            val_loss=self.row["val_loss"],
            train_accuracy=self.row["train_accuracy"],
            train_loss=self.row["train_loss"],
            epochs=last["epoch"],
            parameters=setup.summary.parameters,
            macs=setup.summary.macs,
            val_chance=setup.chance,
            val_images=len(setup.validation.rows),
        )


def oldest_is_lowest(history: list[HistoryRow], count: int) -> bool:
    """The published early-stop criterion: the oldest of the last `count` validation losses is the lowest."""
    losses = [row["val_loss"] for row in history[-count:]]
    return len(losses) == count and losses[0] == min(losses)


def is_of_compiler(error: BaseException) -> bool:
    """Whether torch.compile itself failed, rather than the network. By name, as importing its exceptions takes 1 s."""
    names = {"InductorError", "BackendCompilerFailed"}
    return any(kind.__name__ in names and kind.__module__.startswith("torch.") for kind in type(error).__mro__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a GPU ran out of memory; PyTorch's CPU allocator error is recognised only by its text."""
    kinds = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return kinds or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip()
