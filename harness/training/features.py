"""Cached features: the outputs of a network's frozen first layers, computed once and stored in place of images."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config import Augmentation, Trial
from harness.data.batches import DeviceSplit, Normalizer
from harness.run import storage, system
from harness.run.cache import cache_folder
from harness.run.provenance import code_digest
from harness.training import execution
from harness.training.execution import ExecutionPlan, autocast

KEPT_BYTES = 20 << 30  # limit for all files of features; the least recently used are removed
Answer = Callable[[torch.Tensor], torch.Tensor]


def are_cached(network: nn.Module, config: Trial, plan: ExecutionPlan) -> bool:
    """Whether trials of this configuration train on cached features; not under torch.compile or with augmentation."""
    has_some = bool(getattr(network, "frozen_prefix", ()))
    return config.cache_features and has_some and not plan.traces and config.augmentation == Augmentation()


class Features:
    """Splits with features in place of images, loaded from the cache or computed.

    `network`: on the device, as the plan executes it. `fingerprint`: of the images.
    """

    def __init__(self, network: Any, config: Trial, plan: ExecutionPlan, device: torch.device, fingerprint: str):
        self.network, self.plan, self.device = network, plan, device
        self.normalize = Normalizer(config.normalization, device, plan.memory_format)
        self.digest = hashlib.sha256()
        for name, tensor in sorted(network.state_dict().items()):
            if name.startswith(tuple(f"{path}." for path in network.frozen_prefix)):
                self.digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        machine = execution.processor_name(device)
        how = {part: value for part, value in vars(plan).items() if part != "source"}
        fields = {"architecture", "options", "normalization"}
        known = [config.model_dump(mode="json", include=fields), how, fingerprint, machine]
        known += [system.environment().versions, code_digest(config.architecture)]
        self.digest.update(json.dumps(known, sort_keys=True).encode())

    def answer(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast(self.plan.precision, self.device):
            return stored_layout(self.network.features(self.normalize(images)))

    def of(self, name: str, part: DeviceSplit, batch_size: int) -> DeviceSplit:
        """The split with features computed in batches of `batch_size`. Raises StorageError where writing them fails."""
        folder = cache_folder("features")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        digest = self.digest.copy()
        digest.update(str(batch_size).encode())
        self.network.eval()
        features = cached_features(folder / f"{digest.hexdigest()[:24]}-{name}.pt", part, batch_size, self.answer)
        if self.device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(self.device)[0] / 2:
            features = features.to(self.device)
        return DeviceSplit(features, part.labels[part.rows], torch.arange(len(part.rows), device=part.rows.device))


def cached_features(file: Path, part: DeviceSplit, size: int, answer: Answer) -> torch.Tensor:
    """The features in that file, which one process of a node writes while the others wait. They are recomputed where
    the file cannot be read, or its first batch differs from what the network computes now."""
    from filelock import FileLock

    with FileLock(file.with_suffix(".lock")):
        try:
            found = _mapped(file)
            first = answer(part.batch(rows_of(part, size)[0])[0]).cpu()[: len(part.rows)]
            if torch.equal(found[: len(first)], first):
                os.utime(file)
                return found
        except Exception:  # missing or corrupt, whatever the error: recompute
            pass
        _write(file, part, size, answer)
        _make_room(file)
    return _mapped(file)


def _mapped(file: Path) -> torch.Tensor:
    features: torch.Tensor = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    return features


def rows_of(part: DeviceSplit, size: int) -> tuple[torch.Tensor, ...]:
    """The split's rows in full batches: the last one is filled up from the first image on."""
    whole = -(-len(part.rows) // size) * size
    return torch.split(part.rows[torch.arange(whole, device=part.rows.device) % len(part.rows)], size)


def _write(file: Path, part: DeviceSplit, size: int, answer: Answer) -> None:
    features = torch.empty(0)
    for number, rows in enumerate(rows_of(part, size)):
        batch = answer(part.batch(rows)[0]).cpu()
        if not number:
            features = batch.new_empty(len(part.rows), *batch.shape[1:])
        place = features[number * size : (number + 1) * size]
        place.copy_(batch[: len(place)])
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with storage.storage_errors_of(file), os.fdopen(descriptor, "wb") as opened:
            torch.save(features, opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _make_room(new: Path) -> None:
    """Remove the least recently used features beyond KEPT_BYTES."""
    others = sorted((path for path in new.parent.glob("*.pt") if path != new), key=lambda path: -path.stat().st_mtime)
    total = new.stat().st_size
    for path in others:
        total += path.stat().st_size
        if total > KEPT_BYTES:
            path.unlink(missing_ok=True)  # processes that have mapped it can still read it


def stored_layout(features: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> dense [N, H, W, C], as images are stored; tensors that are not 4-D only become contiguous."""
    return features.permute(0, 2, 3, 1).contiguous() if features.dim() == 4 else features.contiguous()


class StoredFeatures:
    """Used in place of a Normalizer: features as stored (see `stored_layout`) -> features in that memory format."""

    def __init__(self, memory_format: str):
        self.memory_format = memory_format

    def __call__(self, kept: torch.Tensor) -> torch.Tensor:
        features = kept.permute(0, 3, 1, 2) if kept.dim() == 4 else kept
        return features if self.memory_format == "channels_last" else features.contiguous()
