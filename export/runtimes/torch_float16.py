"""torch.compile under float16 autocast, on CUDA."""

import torch

from export import Artifact
from export.runtimes import Served, Unavailable
from export.runtimes.torch_bfloat16 import autocast_context
from export.runtimes.torch_compile import compiled

FORMAT = "torch"
PRECISION = "float16"


def load(artifact: Artifact, device: str, threads: int) -> Served:
    if device != "cuda":
        raise Unavailable("float16 autocast is used on CUDA here")
    return compiled(artifact, device, threads, autocast_context(device, torch.float16))
