"""Images on the device, and the batches that a step or an evaluation makes of them.

Images stay uint8 [N, H, W, C]; augmentation and normalisation work on the batch tensor, on the device.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from harness import datasets
from harness.config import Data, Normalization, Trial


@dataclass(frozen=True)
class Part:
    """Labels [M] and images uint8 [M, H, W, 3], of which `rows` are meant; too many images stay off the device."""

    images: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of these rows, on the device of `rows`."""
        return self.images[rows.to(self.images.device)].to(rows.device), self.labels[rows]


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@lru_cache(maxsize=1)
def device_data(data_json: str, device: str) -> tuple[datasets.Dataset, dict[str, Part]]:
    """The data set and its parts as tensors; a process that runs trial after trial loads it once.

    On a GPU everything moves there that leaves half of its free memory to the network; on CPU the tensors map the
    machine's cache, one copy for all processes.
    """
    data = datasets.load(Data.model_validate_json(data_json))
    images_device = device
    if device.startswith("cuda"):
        needed = sum({id(p.images): p.images.nbytes for p in (data.train, data.test)}.values())
        if needed > torch.cuda.mem_get_info(device)[0] / 2:
            images_device = "cpu"
    parts = {}
    tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in ("train", "validation", "test"):
        part = getattr(data, name)
        if id(part.images) not in tensors:
            tensors[id(part.images)] = (_tensor(part.images).to(images_device), _tensor(part.labels).to(device))
        parts[name] = Part(*tensors[id(part.images)], torch.from_numpy(part.rows).to(device))
    return data, parts


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Shares the mapped memory; copy-on-write, because PyTorch has no read-only tensors."""
    if isinstance(array, np.memmap) and array.filename is not None:
        array = np.load(array.filename, mmap_mode="c")
    return torch.from_numpy(array)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Mixed precision as named; float32 is no autocast at all."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, DTYPES[precision])


class Normalizer:
    """uint8 images [N, H, W, 3] -> normalised float images [N, 3, H, W] in that memory format."""

    def __init__(self, normalization: Normalization, device: torch.device, memory_format: str = "channels_last"):
        # pixel / 255 - mean) / std as one multiplication and one addition
        scale = [1 / (255 * std) for std in normalization.std]
        shift = [-mean / std for mean, std in zip(normalization.mean, normalization.std, strict=True)]
        self.scale = torch.tensor(scale, device=device)
        self.shift = torch.tensor(shift, device=device)
        self.memory_format = memory_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        normalised = torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)
        return normalised if self.memory_format == "channels_last" else normalised.contiguous()


class Restored:
    """Features as harness/features.py keeps them -> features in that memory format; in the place of a Normalizer."""

    def __init__(self, memory_format: str):
        self.memory_format = memory_format

    def __call__(self, kept: torch.Tensor) -> torch.Tensor:
        features = kept.permute(0, 3, 1, 2) if kept.dim() == 4 else kept
        return features if self.memory_format == "channels_last" else features.contiguous()


@dataclass(frozen=True)
class Draws:
    """The random choices of one epoch: `rows` [n], `flips` bool [n], `shifts` [n, 2] in pixels; None where unused."""

    rows: torch.Tensor
    flips: torch.Tensor | None
    shifts: torch.Tensor | None

    @classmethod
    def of(cls, rows: torch.Tensor, trial: Trial, seed: int) -> "Draws":
        """Drawn on the CPU, so that every device sees the same ones."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(rows), generator=generator)
        flips = torch.rand(len(rows), generator=generator) < 0.5
        shifts = torch.randint(0, 2 * trial.augmentation.crop_padding + 1, (len(rows), 2), generator=generator)
        return cls(
            rows[order.to(rows.device)],
            flips.to(rows.device) if trial.augmentation.flip else None,
            shifts.to(rows.device) if trial.augmentation.crop_padding else None,
        )

    def batch(self, number: int, size: int) -> "Draws":
        part = slice(number * size, (number + 1) * size)
        flips, shifts = (None if t is None else t[part] for t in (self.flips, self.shifts))
        return Draws(self.rows[part], flips, shifts)


def augment(images: torch.Tensor, draws: Draws, padding: int) -> torch.Tensor:
    """Per-image horizontal flip and padded crop (black border) of uint8 images [B, H, W, 3]."""
    if draws.flips is not None:
        images = torch.where(draws.flips[:, None, None, None], images.flip(2), images)
    if draws.shifts is not None:
        count, height, width, _ = images.shape
        padded = nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
        batch = torch.arange(count, device=images.device)[:, None, None]
        rows = (draws.shifts[:, 0, None] + torch.arange(height, device=images.device))[:, :, None]
        columns = (draws.shifts[:, 1, None] + torch.arange(width, device=images.device))[:, None, :]
        images = padded[batch, rows, columns]
    return images
