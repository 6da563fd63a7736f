"""What can serve an exported model, one runtime a file. Parity checks and benchmarks use the same ones.

    FORMAT = "onnx"                         which of a manifest's files it serves
    PRECISION = "bfloat16"                  if it does not compute in the file's own
    load(artifact, device, threads)         -> callable

The callable takes and returns host arrays: float32 [N, 3, H, W] normalised (or uint8 [N, H, W, 3], as the file's entry
in the manifest says) to logits float32 [N, classes]. `device` is cpu or cuda, `threads` those of CPU work. Where it has
an attribute `on_device` (see Served), that is the same for tensors on the device. A runtime that cannot do what it is
asked here raises Unavailable with the reason; it never does something else instead.
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
    """What `load` returns where images and logits may also stay on the device.

    `on_device` takes a contiguous tensor, and returns logits that may be overwritten by the next call and may still be
    computed on the current stream.
    """

    host: Predict
    on_device: "Callable[[torch.Tensor], torch.Tensor]"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.host(images)


class Unavailable(RuntimeError):
    """This runtime cannot serve this file on this machine."""
