"""torch.compile under bfloat16 autocast, where the device computes bfloat16 natively."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from export import Artifact
from export.runtimes import Served, Unavailable
from export.runtimes.torch_compile import compiled
from harness.run.system import native_bfloat16

FORMAT = "torch"
PRECISION = "bfloat16"


def load(artifact: Artifact, device: str, threads: int) -> Served:
    if device == "cpu" and not native_bfloat16(torch.device("cpu")):
        raise Unavailable("this CPU has no native bfloat16")

    return compiled(artifact, device, threads, autocast_context(device, torch.bfloat16))


def autocast_context(device: str, dtype: torch.dtype) -> Callable[[], AbstractContextManager[object]]:
    """Factory of the context for calls: no gradients, autocast to `dtype`."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with torch.no_grad(), torch.autocast(device, dtype):
            yield

    return context
