"""Training one trial: the one loop. It knows neither ray nor the command line.

    from harness.trial import Job, train
    record = train(Job(config=Trial(architecture="baseline"), data=Data(name="digits")), report=print)

`training` is the loop itself, a generator that yields a row at each validation, so that whoever drives it can stop
between rows; `train` runs it to its end. On CPU the same job gives the same bits, also where it was interrupted and
goes on from a checkpoint: all random draws of an epoch follow from the seed and its number.
"""

import hashlib
import math
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from architectures._summary import Summary, summarize
from harness import checkpoint, execution, gpus, native, plugins, results
from harness.batches import Draws, device_data, pick_device
from harness.config import Data, Trial
from harness.evaluation import EVALUATION_BATCH, Evaluation, evaluate_test
from harness.execution import Plan
from harness.features import Features, are_cached
from harness.ledger import Ledger
from harness.saver import Saver
from harness.step import forget_compiled, learning_rate_factor, make_step


@dataclass(frozen=True)
class Job:
    """One trial to run: its configuration, seed and data, and what is to be recorded beside its metrics.

    `folder`: where trial.json, history.csv and model.safetensors go; None keeps everything in memory.
    `fingerprint`: of the images that are meant; others are an error. `read_test`: evaluate the kept weights on the
    test images at the end. `plan`: what fastest.choose found for the parts that the configuration leaves open.
    `checkpoint_bytes`: what its checkpoints may take on disk.
    """

    config: Trial
    data: Data
    seed: int = 0
    folder: Path | None = None
    fingerprint: str | None = None
    read_test: bool = False
    device: str = "auto"
    plan: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_bytes: float = math.inf
    labels: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data, to be sent to another process."""
        return {
            **vars(self),
            "config": self.config.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "folder": self.folder and str(self.folder),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Job":
        return cls(
            **{
                **values,
                "config": Trial.model_validate(values["config"]),
                "data": Data.model_validate(values["data"]),
                "folder": values["folder"] and Path(values["folder"]),
            }
        )


class Diverged(ArithmeticError):
    """The loss is no number any more."""


def train(job: Job, report: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train to the end; `report` gets each row of the history. Returns the record, which trial.json holds too."""
    loop = training(job)
    while True:
        try:
            row, _ = next(loop)
        except StopIteration as end:
            return end.value
        if report is not None:
            report(row)


Row = dict[str, Any]
Record = dict[str, Any]


def training(job: Job, ledger: Ledger | None = None) -> Generator[tuple[Row, Record], None, Record]:
    """Yields at each validation the row of the history and the record as far as it is; returns the final record.

    A job that goes on from a checkpoint in its folder first yields again what was validated before it.
    `ledger`: holds the time that the trial took before, to start its process for instance. A failure is a record too:
    status `failed`, `oom` or `diverged`, the traceback in error.txt. Only what the driver of the loop raises into it
    passes through.
    """
    ledger = ledger or Ledger()
    history: list[Row] = []
    record: Record = {
        **job.labels,
        "seed": job.seed,
        "config": job.config.model_dump(mode="json"),
        "status": "finished",
        "metrics": {},
        "timing": {},
        "environment": {},
    }
    try:
        try:
            yield from _yielding(job, record, history, ledger)
        except Exception as error:
            if not is_of_compiler(error):
                raise
            # What another process left in the cache of compiled code may be torn: once more, without it.
            forget_compiled()
            history.clear()
            record["metrics"], record["compiled_anew"] = {}, _last_line(error)
            yield from _yielding(job, record, history, ledger)
    except Diverged as error:
        record["status"], record["error"] = "diverged", str(error)
    except Exception as error:
        record["status"], record["error"] = "oom" if is_out_of_memory(error) else "failed", _last_line(error)
        if job.folder is not None:
            checkpoint.write_atomically(job.folder / results.ERROR, traceback.format_exc())
    ledger.enter("checkpoint")
    if job.folder is not None:
        results.write_history(job.folder, history)
    record["timing"] |= ledger.timing()
    if job.folder is not None:
        record = results.write_trial(job.folder, record)
        if record["status"] in ("finished", "diverged"):
            checkpoint.remove_generations(job.folder)
    return record


def _yielding(job: Job, record: Record, history: list[Row], ledger: Ledger) -> Iterator[tuple[Row, Record]]:
    """What `training` yields, the time until the driver comes back booked as idle."""
    for row in _train(job, record, history, ledger):
        ledger.enter("idle")
        record["timing"] |= ledger.timing()
        yield row, record
        ledger.enter("train")


def _train(job: Job, record: Record, history: list[Row], ledger: Ledger) -> Iterator[Row]:
    config = job.config
    device = pick_device(job.device)
    plan = Plan.of(config, device, job.plan)
    machine = {name: value for name, value in results.environment().items() if name != "gpus"}
    record["environment"] = {**vars(plan), **machine, "code": results.code_digest(config.architecture)}
    if device.type == "cuda":
        record["environment"]["gpu"] = gpus.describe(device)
        torch.cuda.reset_peak_memory_stats(device)  # of the trials that this process ran before
    ledger.enter("data")
    data, parts = device_data(job.data.model_dump_json(), str(device))
    ledger.enter("build")
    if job.fingerprint not in (None, data.fingerprint):
        raise ValueError(f"the images here have fingerprint {data.fingerprint}, those of the run {job.fingerprint}")
    training_part, validation_part = parts["train"], parts["validation"]
    record["environment"]["images_on"] = training_part.images.device.type

    torch.manual_seed(derive(job.seed, "initial weights"))
    network = plugins.build_network(config, len(data.classes), data.input_size)
    summary = summarize(network, data.input_size)
    if plan.compile == "kernels":
        ledger.enter("compile")
        native.library()
        ledger.enter("build")
    on_features = are_cached(network, config, plan)
    step = make_step(network, config, plan, device, on_features)
    network = step.network
    forward: Any = network
    if on_features:
        ledger.enter("data")
        answers = Features(network, config, plan, device, data.fingerprint)
        training_part = answers.of("train", training_part, config.batch_size)
        validation_part = answers.of("validation", validation_part, EVALUATION_BATCH)
        forward = network.head
        ledger.enter("build")
    evaluate_now = Evaluation(network, step.normalize, device, forward)

    steps_per_epoch = len(training_part.rows) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"trial.batch_size={config.batch_size}: more than the {len(training_part.rows)} training images"
        )
    total_steps = config.epochs * steps_per_epoch
    validations = min(config.validations_per_epoch, steps_per_epoch)
    validate_at = {round((i + 1) * steps_per_epoch / validations) for i in range(validations)}
    best: dict[str, Any] | None = None
    best_state: dict[str, torch.Tensor] = {}
    images_trained = 0
    stopped_early = False
    before = 0.0  # seconds of an interrupted process
    of = {
        "config": config.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "seed": job.seed,
        "fingerprint": data.fingerprint,
        "code": record["environment"]["code"],
        "versions": record["environment"]["versions"],
        "plan": vars(plan),
    }
    saver = Saver(job.folder, config.checkpoint_seconds, job.checkpoint_bytes, of)
    ledger.enter("checkpoint")
    tensors, about = saver.newest(record)
    if tensors:
        step.restore(tensors, about["scaler"])
        kept = "best."
        best_state = {k.removeprefix(kept): v.to(device) for k, v in tensors.items() if k.startswith(kept)}
        before = about["history"][-1]["seconds"]
        assert job.folder is not None
        results.write_history(job.folder, about["history"])  # whoever stops it may do so in what is yielded again
        for row in about["history"]:
            history.append(row)
            if best is None or _better(row, best, config):
                best = row
            record["metrics"] = _metrics(best, row, summary)
            record["timing"] = about["timing"]
            yield row

    first_step = True
    for epoch in range(round(history[-1]["epoch"]) if history else 0, config.epochs):
        ledger.enter("train")
        draws = Draws.of(training_part.rows, config, derive(job.seed, "batches", epoch))
        torch.manual_seed(derive(job.seed, "dropout", epoch))
        network.train()
        sums = torch.zeros(2, device=device)
        seen = 0
        for number in range(steps_per_epoch):
            batch = draws.batch(number, config.batch_size)
            done = epoch * steps_per_epoch + number
            rate = config.optimizer.lr * learning_rate_factor(config.schedule, done, total_steps, steps_per_epoch)
            if first_step and (plan.traces or plan.captured):
                ledger.enter("compile")
                machine_name = execution.machine_name(device)
                shape = execution.shape_key(config, len(data.classes), data.input_size, machine_name, plan.threads)
                with execution.compiling(plan, shape):
                    sums += step(training_part, batch, rate)
                ledger.enter("train")
            else:
                sums += step(training_part, batch, rate)
            first_step = False
            seen += config.batch_size
            if number + 1 not in validate_at:
                continue

            train_loss, train_accuracy = (sums / seen).tolist()  # waits for the device
            ledger.enter("validate")
            images_trained += seen
            val_loss, val_accuracy = evaluate_now(validation_part, plan.precision)
            ledger.enter("checkpoint")
            spent = {kind: ledger.seconds.get(kind, 0.0) for kind in ("compile", "train", "validate")}
            row = {
                "epoch": epoch + (number + 1) / steps_per_epoch,
                "step": done + 1,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "seconds": before + sum(spent.values()),
            }
            history.append(row)
            if job.folder is not None:
                results.write_history(job.folder, history)
            if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                raise Diverged(f"loss {train_loss} in training, {val_loss} in validation at step {done + 1}")
            if best is None or _better(row, best, config):
                best = row
                best_state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
            record["metrics"] = _metrics(best, row, summary)
            # The first step's images count only where it belongs to training's time.
            timed = images_trained - (config.batch_size if spent["compile"] else 0)
            record["timing"] = {
                "train_seconds": spent["train"],
                "validate_seconds": spent["validate"],
                "images_per_second": timed / spent["train"] if timed else 0.0,
            }
            record["environment"] |= gpus.peak_memory(device)
            stopped_early = config.early_stop is not None and oldest_is_lowest(history, config.early_stop)
            if stopped_early or done + 1 == total_steps:
                break
            if number + 1 == steps_per_epoch:
                saver.save(epoch + 1, step, best_state, history, record)
            yield row
            sums.zero_()
            seen = 0
            network.train()
        if stopped_early:
            break

    record["kept_epoch"] = best["epoch"] if best else None
    if job.read_test:
        ledger.enter("validate")
        plain = plugins.build_network(config, len(data.classes), data.input_size, restoring=True)
        plain.load_state_dict(best_state)
        test_loss, test_accuracy = evaluate_test(plain, config, device, parts["test"], data.fingerprint)
        ledger.enter("checkpoint")
        record["metrics"] |= {"test_accuracy": test_accuracy, "test_loss": test_loss}
    if job.folder is not None:
        record["weights_sha256"] = checkpoint.save_weights(job.folder / results.WEIGHTS, best_state)


def _better(row: Row, best: Row, config: Trial) -> bool:
    return config.keep == "last" or row["val_accuracy"] > best["val_accuracy"]


def _metrics(best: Row, last: Row, summary: Summary) -> dict[str, Any]:
    metrics = {k: best[k] for k in ("val_accuracy", "val_loss", "train_accuracy", "train_loss")}
    return metrics | {"epochs": last["epoch"], "parameters": summary.parameters, "macs": summary.macs}


def oldest_is_lowest(history: list[dict[str, Any]], count: int) -> bool:
    """The report's early stop: of the last `count` validation losses the oldest is the lowest."""
    losses = [row["val_loss"] for row in history[-count:]]
    return len(losses) == count and losses[0] == min(losses)


def derive(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose of a trial: no draw depends on how many others were made before."""
    return int.from_bytes(hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:7])


def is_of_compiler(error: BaseException) -> bool:
    """Whether torch.compile failed itself, not what it compiles; its exceptions' modules take a second to import."""
    names = {"InductorError", "BackendCompilerFailed"}
    return any(kind.__name__ in names and kind.__module__.startswith("torch.") for kind in type(error).__mro__)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host, or of a GPU. PyTorch's allocator for CPUs raises what nothing but its text tells apart."""
    kinds = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return kinds or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip()
