"""Eager PyTorch, without compilation: the reference for logits and speed."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from export import Artifact
from export.runtimes import Served, Unavailable
from harness.config import Trial
from harness.training.compilation import to_device, usable_format
from harness.training.network import restore_network

FORMAT = "torch"


def load(artifact: Artifact, device: str, threads: int) -> Served:
    module, memory_format = network(artifact, device, threads)
    return as_served(module, device, memory_format)


def network(artifact: Artifact, device: str, threads: int) -> tuple[nn.Module, str]:
    """(trained network on the device, float32, eval mode; its memory format, channels_last where it can)

    Raises Unavailable without that device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("PyTorch sees no CUDA device")
    torch.set_num_threads(threads)
    manifest = artifact.manifest
    trial = Trial.model_validate(manifest.config)
    classes, side = len(manifest.classes), manifest.input_size
    found = restore_network(artifact.folder, trial, manifest.weights_sha256, classes, side)
    memory_format = usable_format(found, side)
    return to_device(found, torch.device(device), memory_format), memory_format


def as_served(
    module: Callable[[torch.Tensor], torch.Tensor],
    device: str,
    memory_format: str,
    context: Callable[[], AbstractContextManager[object]] = torch.inference_mode,
) -> Served:
    """Wrap a module, called inside `context()`. A call includes the conversion to `memory_format` and, for host arrays,
    the copies to and from the device."""
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format

    def on_device(images: torch.Tensor) -> torch.Tensor:
        with context():
            logits: torch.Tensor = module(images.to(memory_format=layout))
            return logits.float()

    def host(images: np.ndarray) -> np.ndarray:
        return on_device(torch.from_numpy(images).to(device)).cpu().numpy()

    return Served(host, on_device)
