"""How good a network is on the images of a part, and networks of finished trials again."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import checkpoint, plugins, results
from harness.batches import Normalizer, Part, Restored, autocast, device_data, pick_device
from harness.config import Data, Trial
from harness.execution import Plan
from harness.features import Features, are_cached
from harness.step import to_device

EVALUATION_BATCH = 500


class Evaluation:
    """Loss and accuracy of a network over the images of a part, dropout off; the same batches every time.

    `normalize`: from what the part holds to what `forward` takes, by default the network itself.
    """

    def __init__(self, network: nn.Module, normalize: Any, device: torch.device, forward: Any = None):
        self.network, self.device = network, device
        self.normalize, self.forward = normalize, network if forward is None else forward

    def logits(self, part: Part, precision: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(logits float32 [B, classes], labels [B]) batch after batch."""
        self.network.eval()
        for rows in part.rows.split(EVALUATION_BATCH):
            images, labels = part.batch(rows)
            with torch.no_grad(), autocast(precision, self.device):
                logits = self.forward(self.normalize(images)).float()
            yield logits, labels

    def __call__(self, part: Part, precision: str) -> tuple[float, float]:
        """(mean cross-entropy, accuracy)"""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for logits, labels in self.logits(part, precision):
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack((loss.double(), (logits.argmax(1) == labels).sum().double()))
        loss, accuracy = (sums / len(part.rows)).tolist()
        return loss, accuracy


def restore(folder: Path, record: Mapping[str, Any], num_classes: int, input_size: int) -> nn.Module:
    """The trained network of a finished trial, on the CPU in eval mode; ValueError where its weights are torn or not
    there."""
    if not (folder / results.WEIGHTS).is_file():
        raise ValueError(
            f"{folder / results.WEIGHTS}: only the trial's results are here; remove {folder / results.TRIAL} and give "
            "the command again to train it here"
        )
    config = Trial.model_validate(record["config"])
    network = plugins.build_network(config, num_classes, input_size, restoring=True)
    network.load_state_dict(checkpoint.load_weights(folder / results.WEIGHTS, record["weights_sha256"]))
    return network.eval()


def read_test(folder: Path, record: dict[str, Any], data: Data, device: str = "auto") -> dict[str, Any]:
    """The record with the test set read for its kept weights, in float32; also written to trial.json."""
    target = pick_device(device)
    dataset, parts = device_data(data.model_dump_json(), str(target))
    config = Trial.model_validate(record["config"])
    network = restore(folder, record, len(dataset.classes), dataset.input_size)
    test_loss, test_accuracy = evaluate_test(network, config, target, parts["test"], dataset.fingerprint)
    record = {**record, "metrics": {**record["metrics"], "test_accuracy": test_accuracy, "test_loss": test_loss}}
    return results.write_trial(folder, record)


def evaluate_test(
    network: Any, config: Trial, device: torch.device, part: Part, fingerprint: str
) -> tuple[float, float]:
    """(loss, accuracy) of the network as it was built, eager and in float32, whatever plan trained it."""
    network = to_device(network, device)
    plan = Plan(device.type, "float32", "off", "channels_last", torch.get_num_threads())
    normalize: Any = Normalizer(config.normalization, device, plan.memory_format)
    forward: Any = network
    if are_cached(network, config, plan):
        with contextlib.suppress(OSError):  # a disk that takes no features does not cost a trained network its result
            part = Features(network, config, plan, device, fingerprint).of("test", part, EVALUATION_BATCH)
            normalize, forward = Restored(plan.memory_format), network.head
    return Evaluation(network, normalize, device, forward)(part, plan.precision)
