"""torch.compile with its default mode, one static graph per batch size; a graph break is an error."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from export import Artifact
from export.runtimes import Served, Unavailable
from export.runtimes.torch_eager import as_served, network
from harness.run.system import compiler

FORMAT = "torch"


def load(artifact: Artifact, device: str, threads: int) -> Served:
    return compiled(artifact, device, threads)


def compiled(
    artifact: Artifact,
    device: str,
    threads: int,
    context: Callable[
        [], AbstractContextManager[object]
    ] = torch.no_grad,  # freezing needs it, inference mode is not enough
    **how: Any,
) -> Served:
    """The network compiled with the options `how` of torch.compile; each call runs inside `context()`.

    Raises Unavailable where there is no compiler or compilation fails.
    """
    if not compiler(device):
        raise Unavailable("torch.compile needs a C++ compiler on CPU and a C compiler on CUDA; install g++")
    if torch._inductor.config.cpp.vec_isa_ok is None:
        torch._inductor.config.cpp.vec_isa_ok = True  # else each process compiles a test of vector instructions
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    # Past the recompile limit PyTorch would run eager code: raise an error instead, and allow many batch sizes.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64
    side = artifact.manifest.input_size
    found, memory_format = network(artifact, device, threads)
    module = torch.compile(found, dynamic=False, fullgraph=True, **how)
    served = as_served(module, device, memory_format, context)
    try:
        served(np.zeros((2, 3, side, side), np.float32))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"torch.compile on {device}: {reason}") from error
    return served
