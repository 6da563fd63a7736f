"""Images on the device, and the batches that training and evaluation take from them.

Images stay uint8 [N, H, W, 3]; batches are normalised on the device.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from harness.config import Data, Normalization
from harness.data.dataset import load_dataset
from harness.data.splits import Dataset


@dataclass(frozen=True)
class DeviceSplit:
    """A split: its `rows` [N] in images uint8 [M, H, W, 3] and labels [M]; large image sets stay in host memory."""

    images: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, H, W, 3] and labels [B] of rows [B], on the device of `rows`."""
        return self.images[rows.to(self.images.device)].to(rows.device), self.labels[rows]


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is cuda if there is a GPU, else cpu."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


@lru_cache(maxsize=1)
def device_data(data_json: str, device: str) -> tuple[Dataset, dict[str, DeviceSplit]]:
    """The data set and its splits as tensors; loaded once by a process that runs several trials."""
    data = load_dataset(Data.model_validate_json(data_json))
    return data, on_device(data, device)


def on_device(data: Dataset, device: str) -> dict[str, DeviceSplit]:
    """The splits `train`, `validation` and `test` as tensors.

    Images move to a GPU if they fit in half of its free memory; on a CPU the tensors map the cached files, so that all
    processes share one copy.
    """
    images_device = device
    if device.startswith("cuda"):
        needed = sum({id(p.images): p.images.nbytes for p in (data.train, data.test)}.values())
        if needed > torch.cuda.mem_get_info(device)[0] / 2:
            images_device = "cpu"
    splits = {}
    tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        if id(split.images) not in tensors:
            tensors[id(split.images)] = (_tensor(split.images).to(images_device), _tensor(split.labels).to(device))
        splits[name] = DeviceSplit(*tensors[id(split.images)], torch.from_numpy(split.rows).to(device))
    return splits


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares mapped memory; copy-on-write, because PyTorch has no read-only tensors."""
    if isinstance(array, np.memmap) and array.filename is not None:
        array = np.load(array.filename, mmap_mode="c")
    return torch.from_numpy(array)


class Normalizer:
    """uint8 images [N, H, W, 3] -> normalised float images [N, 3, H, W] in `memory_format`."""

    def __init__(self, normalization: Normalization, device: torch.device, memory_format: str = "channels_last"):
        # (pixel / 255 - mean) / std as one multiplication and one addition
        scale = [1 / (255 * std) for std in normalization.std]
        shift = [-mean / std for mean, std in zip(normalization.mean, normalization.std, strict=True)]
        self.scale = torch.tensor(scale, device=device)
        self.shift = torch.tensor(shift, device=device)
        self.memory_format = memory_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        normalised = torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)
        return normalised if self.memory_format == "channels_last" else normalised.contiguous()
