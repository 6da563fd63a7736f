"""torch.compile under bfloat16 autocast, where the device computes bfloat16 natively."""

import contextlib
from collections.abc import Iterator

import torch

from export import Artifact
from export.runtimes import Predict, Unavailable
from export.runtimes.torch_compile import compiled
from harness.execution import native_bfloat16

FORMAT = "torch"
PRECISION = "bfloat16"


def load(artifact: Artifact, device: str, threads: int) -> Predict:
    if device == "cpu" and not native_bfloat16(torch.device("cpu")):
        raise Unavailable("this CPU computes no bfloat16 natively")

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            yield

    return compiled(artifact, device, threads, context)
