"""torch.compile that times several kernels for each matrix product and convolution, and captures CUDA graphs."""

from export import Artifact
from export.runtimes import Served
from export.runtimes.torch_compile import compiled

FORMAT = "torch"


def load(artifact: Artifact, device: str, threads: int) -> Served:
    return compiled(artifact, device, threads, mode="max-autotune")
