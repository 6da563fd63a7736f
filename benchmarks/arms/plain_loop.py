"""A typical plain PyTorch script: DataLoader, per-image PIL transforms, float32, eager, `loss.item()` each step.

The images are already decoded, as in torchvision.datasets.CIFAR10, and all trials run in one process; both make it
faster than many scripts.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.arms.measure import ArmRequest
from harness.data.dataset import load_dataset
from harness.data.splits import Split
from harness.training.network import build_network


class Images(Dataset):
    """(image, label) pairs of a split, as in torchvision's in-memory data sets."""

    def __init__(self, part: Split, transform: Callable):
        self.images, self.labels = part.images[part.rows], part.labels[part.rows]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def loaders(request: ArmRequest, workers: int) -> tuple[DataLoader, DataLoader]:
    trial, data = request.trial, load_dataset(request.data)
    normalize = [transforms.ToTensor(), transforms.Normalize(trial.normalization.mean, trial.normalization.std)]
    flip = [transforms.RandomHorizontalFlip()] if trial.augmentation.flip else []
    training = Images(data.train, transforms.Compose(flip + normalize))
    validation = Images(data.validation, transforms.Compose(normalize))
    return (
        DataLoader(training, batch_size=trial.batch_size, shuffle=True, num_workers=workers, drop_last=True),
        DataLoader(validation, batch_size=trial.batch_size, shuffle=False, num_workers=workers),
    )


Report = Callable[[dict[str, float], nn.Module, torch.optim.Optimizer], Any]


def train_plainly(request: ArmRequest, seed: int, workers: int, report: Report) -> dict[str, Any]:
    """Train one trial; `report` gets each validation, the network and its optimiser."""
    trial, device = request.trial, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    training, validation = loaders(request, workers)
    network = build_network(trial, request.num_classes, request.input_size).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=trial.optimizer.lr)
    criterion = nn.CrossEntropyLoss()
    half = len(training) // 2
    seconds, images = 0.0, 0
    best: dict[str, float] = {"val_accuracy": 0.0}
    for epoch in range(trial.epochs):
        network.train()
        running_loss = 0.0
        mark = time.perf_counter()
        for number, (inputs, labels) in enumerate(training):
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(network(inputs), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            images += len(labels)
            if number + 1 not in (half, len(training)):
                continue
            seconds += time.perf_counter() - mark
            network.eval()
            correct = total = 0
            with torch.no_grad():
                for inputs, labels in validation:
                    predicted = network(inputs.to(device)).argmax(1).cpu()
                    correct += (predicted == labels).sum().item()
                    total += len(labels)
            network.train()
            row = {"epoch": epoch + (number + 1) / len(training), "val_accuracy": correct / total}
            best = max(best, row, key=lambda r: r["val_accuracy"])
            report(row, network, optimizer)
            mark = time.perf_counter()
    told = {"val_accuracy": best["val_accuracy"], "images": images, "train_seconds": seconds}
    return told | {"cuda": device.type == "cuda", "precision": precision(device)}


def precision(device: torch.device) -> str:
    """Default precision of PyTorch's convolutions, nearly all of the work: TF32 on GPUs that have it, else float32."""
    if device.type != "cuda" or not torch.backends.cudnn.allow_tf32:
        return "float32"
    return "tf32" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
