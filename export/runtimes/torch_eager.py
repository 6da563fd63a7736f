"""PyTorch as it is, without compilation: the reference for answers and speed."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from export import Artifact
from export.runtimes import Predict, Unavailable
from harness.evaluation import restore
from harness.step import to_device

FORMAT = "torch"


def load(artifact: Artifact, device: str, threads: int) -> Predict:
    return as_predict(network(artifact, device, threads), device)


def network(artifact: Artifact, device: str, threads: int) -> nn.Module:
    """The trained network on its device, float32, channels_last, eval mode."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("PyTorch sees no CUDA device")
    torch.set_num_threads(threads)
    manifest = artifact.manifest
    found = restore(artifact.folder, manifest, len(manifest["classes"]), manifest["input_size"])
    return to_device(found, torch.device(device))


def as_predict(module, device: str, context: Callable[[], AbstractContextManager] = torch.inference_mode) -> Predict:
    """Host arrays in and out around a module called in that context; the copies belong to the call."""

    def predict(images: np.ndarray) -> np.ndarray:
        with context():
            inputs = torch.from_numpy(images).to(device, memory_format=torch.channels_last)
            return module(inputs).float().cpu().numpy()

    return predict
