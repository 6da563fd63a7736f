"""Sets up a trial from its job: device, images, network, step, evaluation and checkpoints."""

import copy
import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.config import Trial
from harness.cpu_kernels import build
from harness.data.batches import DeviceSplit, device_data, on_device, pick_device
from harness.data.splits import Dataset
from harness.run import gpus, system
from harness.run.provenance import code_digest
from harness.run.records import TrialEnvironment, TrialRecord
from harness.run.storage import Json
from harness.training import execution
from harness.training.checkpointing import Checkpointer
from harness.training.compilation import usable_format
from harness.training.evaluation import EVALUATION_BATCH, Evaluation
from harness.training.execution import ExecutionPlan
from harness.training.features import Features, are_cached
from harness.training.job import TrainingJob
from harness.training.network import NetworkSummary, build_network, summarize_network
from harness.training.step import Step, make_step
from harness.training.timers import Timers


@dataclass
class TrainingSetup:
    """`training`, `validation`: images, or features of frozen layers. `validate_at`: 1-based steps of an epoch after
    which the network is validated. `shape`: key of the compiled code, for execution.compiling. `chance`: share of the
    most frequent class of the validation images."""

    device: torch.device
    plan: ExecutionPlan
    data: Dataset
    training: DeviceSplit
    validation: DeviceSplit
    test: DeviceSplit
    summary: NetworkSummary
    step: Step
    evaluate: Evaluation
    steps_per_epoch: int
    validate_at: set[int]
    checkpointer: Checkpointer
    shape: str
    chance: float


def set_up(job: TrainingJob, record: TrialRecord, timers: Timers) -> TrainingSetup:
    """Everything that the loop needs; records in `record.environment` where and how the trial runs.

    Raises ValueError where the images are not those of the run or are fewer than a batch, and BadInput where the
    device does not support the configuration.
    """
    config, device = job.config, pick_device(job.device)
    plan = ExecutionPlan.of(config, device, job.plan)
    machine = system.environment()
    code = code_digest(config.architecture, job.network)
    record.environment = TrialEnvironment(**vars(plan), **machine.model_dump(exclude={"gpus"}), code=code)
    if device.type == "cuda":
        record.environment.gpu = gpus.describe(device)
        torch.cuda.reset_peak_memory_stats(device)  # else they include this process's earlier trials

    timers.enter("data")
    data, splits = _images(job, device)
    timers.enter("build")
    training, validation = splits["train"], splits["validation"]
    record.environment.images_on = training.images.device.type

    torch.manual_seed(derive(job.seed, "initial weights"))
    network = untrained_network(job, data)
    summary = summarize_network(network, data.input_size)
    if config.memory_format == "auto" and plan.memory_format == "channels_last" and plan.compile != "kernels":
        plan = dataclasses.replace(plan, memory_format=usable_format(network, data.input_size))
        record.environment.memory_format = plan.memory_format
    if plan.compile == "kernels":
        timers.enter("compile")
        build.library()
        timers.enter("build")
    on_features = are_cached(network, config, plan)
    step = make_step(network, config, plan, device, on_features)
    forward: Any = step.network
    if on_features:
        timers.enter("data")
        features = Features(step.network, config, plan, device, data.fingerprint)
        training = features.of("train", training, config.batch_size)
        validation = features.of("validation", validation, EVALUATION_BATCH)
        forward = step.network.head
        timers.enter("build")

    steps_per_epoch, validate_at = steps_of_epoch(config, len(training.rows))
    processor = execution.processor_name(device)
    return TrainingSetup(
        chance=_largest_class(validation),
        device=device,
        plan=plan,
        data=data,
        training=training,
        validation=validation,
        test=splits["test"],
        summary=summary,
        step=step,
        evaluate=Evaluation(step.network, step.normalize, device, forward),
        steps_per_epoch=steps_per_epoch,
        validate_at=validate_at,
        checkpointer=_checkpointer(job, plan, data, code),
        shape=execution.shape_key(config, len(data.classes), data.input_size, processor, plan.threads),
    )


def _largest_class(part: DeviceSplit) -> float:
    """Share of the most frequent class of a split."""
    counts = torch.bincount(part.labels[part.rows])
    return float(counts.max() / counts.sum())


def _images(job: TrainingJob, device: torch.device) -> tuple[Dataset, dict[str, DeviceSplit]]:
    """The job's data set and its splits on the device; ValueError where they are not the images of the run."""
    if job.dataset is None:
        data, splits = device_data(job.data.model_dump_json(), str(device))
    else:
        data, splits = job.dataset, on_device(job.dataset, str(device))
    if job.fingerprint not in (None, data.fingerprint):
        here, of_run = data.fingerprint, job.fingerprint
        raise ValueError(f"the images on this node have fingerprint {here}, those of the run {of_run}")
    return data, splits


def _checkpointer(job: TrainingJob, plan: ExecutionPlan, data: Dataset, code: str) -> Checkpointer:
    """A Checkpointer for this job only: its configuration, seed, images, code, versions and plan."""
    depends_on: Json = {
        "config": job.config.model_dump(mode="json", exclude={"checkpoint_seconds"}),
        "seed": job.seed,
        "fingerprint": data.fingerprint,
        "code": code,
        "versions": system.environment().versions,
        "plan": vars(plan),
    }
    if job.network is not None:
        depends_on["network"] = _digest_of(job.network)
    return Checkpointer(job.folder, job.config.checkpoint_seconds, job.checkpoint_bytes, depends_on)


def _digest_of(network: nn.Module) -> str:
    """Of a network's layers and weights."""
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def untrained_network(job: TrainingJob, data: Dataset, *, restoring: bool = False) -> nn.Module:
    """A copy of the job's network, or a new one of its architecture; `restoring` as for build_network."""
    if job.network is not None:
        return copy.deepcopy(job.network).cpu()
    return build_network(job.config, len(data.classes), data.input_size, restoring=restoring)


def steps_of_epoch(config: Trial, images: int) -> tuple[int, set[int]]:
    """(steps per epoch, 1-based steps after which to validate: evenly spaced, the last one included)

    Raises ValueError where the images are fewer than a batch.
    """
    steps = images // config.batch_size
    if steps == 0:
        raise ValueError(f"trial.batch_size={config.batch_size}: more than the {images} training images")
    validations = min(config.validations_per_epoch, steps)
    return steps, {round((i + 1) * steps / validations) for i in range(validations)}


def derive(seed: int, *purpose: str | int) -> int:
    """A separate seed for each purpose of a trial, so that no draw depends on how many were made before it."""
    return int.from_bytes(hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:7])
