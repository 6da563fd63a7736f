"""Loss and accuracy of a network on a split."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config import Data, Trial
from harness.data.batches import DeviceSplit, Normalizer, device_data, pick_device
from harness.run.records import TrialRecord, write_correct, write_trial
from harness.training.compilation import to_device, usable_format
from harness.training.execution import ExecutionPlan, autocast
from harness.training.features import Features, StoredFeatures, are_cached
from harness.training.network import restore_network

EVALUATION_BATCH = 500


class Evaluation:
    """Loss and accuracy of a network on a split, with dropout off and always the same batches.

    `normalize`: maps a batch of the split to the input of `forward`, which is the network by default.
    """

    def __init__(self, network: nn.Module, normalize: Any, device: torch.device, forward: Any = None):
        self.network, self.device = network, device
        self.normalize, self.forward = normalize, network if forward is None else forward

    def logits(self, part: DeviceSplit, precision: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields (logits float32 [B, classes], labels [B]) for each batch."""
        self.network.eval()
        for rows in torch.split(part.rows, EVALUATION_BATCH):
            images, labels = part.batch(rows)
            with torch.no_grad(), autocast(precision, self.device):
                logits = self.forward(self.normalize(images)).float()
            yield logits, labels

    def __call__(self, part: DeviceSplit, precision: str) -> tuple[float, float]:
        """(mean cross-entropy, accuracy)"""
        loss, correct = self.by_image(part, precision)
        loss_value, accuracy = torch.stack((loss, correct.double().mean())).tolist()  # waits for the device once
        return loss_value, accuracy

    def by_image(self, part: DeviceSplit, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean cross-entropy, float64; whether each image is classified correctly, bool [N])"""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = []
        for logits, labels in self.logits(part, precision):
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").double()
            correct.append(logits.argmax(1) == labels)
        return loss / len(part.rows), torch.cat(correct)


def read_test(folder: Path, record: TrialRecord, data: Data, device: str = "auto") -> TrialRecord:
    """Evaluate the kept weights on the test split, in float32; returns the record, which is also written to trial.json.

    Raises ValueError where the weights are missing or corrupt.
    """
    target = pick_device(device)
    dataset, splits = device_data(data.model_dump_json(), str(target))
    trial = record.trial
    network = restore_network(folder, trial, record.weights_sha256, len(dataset.classes), dataset.input_size)
    record_test(folder, record, *evaluate_test(network, trial, target, splits["test"], dataset.fingerprint))
    return write_trial(folder, record)


def record_test(folder: Path | None, record: TrialRecord, loss: torch.Tensor, correct: torch.Tensor) -> None:
    """Set the metrics of a read of the test split in the record; write which images are `correct` to the folder."""
    record.metrics.test_loss, record.metrics.test_accuracy = float(loss), float(correct.double().mean())
    if folder is not None:
        record.correct_sha256 = write_correct(folder, correct.cpu().numpy())


def evaluate_test(
    network: Any, config: Trial, device: torch.device, part: DeviceSplit, fingerprint: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, whether each image is classified correctly) of the uncompiled network, eager and in float32, whatever plan
    trained it."""
    memory_format = usable_format(network, int(part.images.shape[1]))
    network = to_device(network, device, memory_format)
    plan = ExecutionPlan(device.type, "float32", "off", memory_format, torch.get_num_threads())
    normalize: Any = Normalizer(config.normalization, device, plan.memory_format)
    forward: Any = network
    if are_cached(network, config, plan):
        with contextlib.suppress(OSError):  # a full disk must not fail the test
            part = Features(network, config, plan, device, fingerprint).of("test", part, EVALUATION_BATCH)
            normalize, forward = StoredFeatures(plan.memory_format), network.head
    return Evaluation(network, normalize, device, forward).by_image(part, plan.precision)
