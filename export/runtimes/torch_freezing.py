"""torch.compile with weights frozen into the code: batch norms fold into convolutions, weights are laid out once."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from export import Artifact
from export.runtimes import Served
from export.runtimes.torch_compile import compiled

FORMAT = "torch"


def load(artifact: Artifact, device: str, threads: int) -> Served:
    # As an option of torch.compile it is ignored (torch 2.15): the setting must be active while a shape is compiled.
    freezing = functools.partial(torch._inductor.config.patch, freezing=True)
    with freezing():
        served = compiled(artifact, device, threads)

    def frozen(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        shapes = set()

        def first(images: Any) -> Any:
            if images.shape in shapes:
                return call(images)
            shapes.add(images.shape)
            with freezing():
                return call(images)

        return first

    return Served(frozen(served.host), frozen(served.on_device))
