"""What the frozen part of a network answers to each image: computed once, then mapped from the cache by every trial.

A network that has `frozen_prefix` (the names of the parts before anything that is trained), `features(images)` and
`head(features)` is trained on the answers of `features` where nothing changes an image from epoch to epoch; a trial
then costs the head alone. Batches are those of training and validation, so that a trial's result is the same.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import datasets, results
from harness.config import Augmentation, Trial
from harness.execution import Plan
from harness.step import Normalizer, Part, autocast


def are_cached(network: nn.Module, config: Trial) -> bool:
    """Whether trials of this configuration train on features."""
    has_some = bool(getattr(network, "frozen_prefix", ()))
    return config.cache_features and has_some and config.augmentation == Augmentation()


def of_parts(
    network: Any,
    config: Trial,
    plan: Plan,
    device: torch.device,
    parts: dict[str, Part],
    fingerprint: str,
    evaluation_batch: int,
) -> dict[str, Part]:
    """Training and validation part with features in the place of images, from the cache or computed now.

    `network`: on the device, as the plan executes it.
    """
    frozen = {n: t for n, t in network.state_dict().items() if any(f".{p}." in f".{n}" for p in network.frozen_prefix)}
    digest = hashlib.sha256()
    for name in sorted(frozen):
        digest.update(name.encode() + frozen[name].detach().cpu().contiguous().numpy().tobytes())
    fields = {"architecture", "options", "normalization", "batch_size"}
    known = [config.model_dump(mode="json", include=fields), vars(plan), fingerprint, evaluation_batch]
    known += [results.environment()["versions"], results.environment()["cpu"], results.code_digest(config.architecture)]
    digest.update(json.dumps(known, sort_keys=True).encode())
    folder = datasets.cache_folder("features")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    normalize = Normalizer(config.normalization, device, plan.memory_format)

    def answer(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast(plan.precision, device):
            return stored(network.features(normalize(images)))

    found = {}
    network.eval()
    for name, size in (("train", config.batch_size), ("validation", evaluation_batch)):
        file = folder / f"{digest.hexdigest()[:24]}-{name}.pt"
        images = _mapped(file, lambda part=parts[name], size=size: _computed(part, size, answer))  # type: ignore[misc]
        if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            images = images.to(device)
        part = parts[name]
        found[name] = Part(images, part.labels[part.rows], torch.arange(len(part.rows), device=part.rows.device))
    return found


def _computed(part: Part, size: int, answer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Features of the part's rows in their order, in whole batches: the last one begins again at the first image."""
    whole = -(-len(part.rows) // size) * size
    rows = part.rows[torch.arange(whole, device=part.rows.device) % len(part.rows)]
    return torch.cat([answer(part.batch(batch)[0]).cpu() for batch in rows.split(size)])[: len(part.rows)]


def _mapped(file: Path, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor of that file, which one process of a machine writes while others wait."""
    from filelock import FileLock

    if not file.exists():
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
                os.close(descriptor)
                try:
                    torch.save(compute(), temporary)
                    os.replace(temporary, file)
                finally:
                    Path(temporary).unlink(missing_ok=True)
    return torch.load(file, mmap=True, weights_only=True, map_location="cpu")


def stored(features: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> dense [N, H, W, C], as images are kept; others stay as they are."""
    return features.permute(0, 2, 3, 1).contiguous() if features.dim() == 4 else features.contiguous()
