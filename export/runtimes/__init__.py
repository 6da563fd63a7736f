"""Runtimes that serve exported files, one per module. Parity checks and benchmarks use the same ones.

    FORMAT = "onnx"                         format of the files that it serves
    PRECISION = "bfloat16"                  only if it differs from the file's
    load(artifact, device, threads)         -> callable

The callable maps host arrays, float32 [N, 3, H, W] normalised (or uint8 [N, H, W, 3], as the file's manifest entry
says), to logits float32 [N, classes]. `device` is cpu or cuda, `threads` the number of CPU threads. An optional
attribute `on_device` of the callable (see Served) does the same for tensors on the device. A runtime that cannot serve
the file as requested raises Unavailable with the reason; it never falls back to something else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Predict = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Served:
    """Returned by `load` where images and logits can also stay on the device.

    `on_device` takes a contiguous tensor. The logits that it returns may still be pending on the current stream, and
    the next call may overwrite them.
    """

    host: Predict
    on_device: "Callable[[torch.Tensor], torch.Tensor]"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.host(images)


class Unavailable(RuntimeError):
    """This runtime cannot serve this file on this machine."""
