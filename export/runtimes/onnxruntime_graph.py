"""onnxruntime on CUDA, fully optimised: a CUDA graph per batch size, channels last, exhaustive algorithm search.

A CUDA graph needs inputs and outputs at fixed device addresses: each call copies the images there, from the host or
from elsewhere on the device.
"""

from collections.abc import Callable

import numpy as np
import onnxruntime
import torch

from export import Artifact
from export.runtimes import Served, Unavailable
from export.runtimes.onnxruntime import bind, opened

FORMAT = "onnx"
PROVIDER = "CUDAExecutionProvider"
OPTIONS = {
    "use_tf32": "0",
    "prefer_nhwc": "1",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "enable_cuda_graph": "1",
}


def load(artifact: Artifact, device: str, threads: int) -> Served:
    if device != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    captured: dict[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]] = {}

    def on_device(images: torch.Tensor) -> torch.Tensor:
        shape = tuple(images.shape)
        if shape not in captured:
            session = opened(artifact, threads, PROVIDER, OPTIONS, tried=False)
            call = at_fixed_addresses(session, torch.empty(shape, dtype=images.dtype, device=device))
            try:
                call(images)
            except Exception as error:
                raise Unavailable(f"onnxruntime with a CUDA graph: {' '.join(str(error).split())[:300]}") from error
            captured[shape] = call
        return captured[shape](images)

    def host(images: np.ndarray) -> np.ndarray:
        return on_device(torch.from_numpy(images)).cpu().numpy()

    served = Served(host, on_device)
    served(np.zeros([2, *map(int, artifact.entry.input.shape[1:])], artifact.entry.input.dtype))
    return served


def at_fixed_addresses(
    session: onnxruntime.InferenceSession, given: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A callable that copies images of its shape into `given`, and returns logits that its next call overwrites."""
    binding = session.io_binding()
    logits = bind(binding, session, given)

    def call(images: torch.Tensor) -> torch.Tensor:
        given.copy_(images)
        torch.cuda.current_stream().synchronize()  # onnxruntime computes on its own stream
        session.run_with_iobinding(binding)
        return logits

    return call
