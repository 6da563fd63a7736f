"""torch.compile with weights frozen into the code: batch norms fold into convolutions, weights are laid out once."""

import numpy as np
import torch

from export import Artifact
from export.runtimes import Predict
from export.runtimes.torch_compile import compiled

FORMAT = "torch"


def load(artifact: Artifact, device: str, threads: int) -> Predict:
    # Given to torch.compile as an option it is ignored (torch 2.15): the setting must hold while a shape is compiled.
    with torch._inductor.config.patch(freezing=True):
        predict = compiled(artifact, device, threads)
    shapes = set()

    def frozen(images: np.ndarray) -> np.ndarray:
        if images.shape in shapes:
            return predict(images)
        shapes.add(images.shape)
        with torch._inductor.config.patch(freezing=True):
            return predict(images)

    return frozen
