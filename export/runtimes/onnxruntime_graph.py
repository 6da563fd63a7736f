"""onnxruntime on CUDA with all that it offers: a CUDA graph for each batch size, channels last, algorithms tried out.

Inputs and outputs stay bound to memory of the device, which a graph needs: a call copies images in and logits out.
"""

import numpy as np
import onnxruntime

from export import Artifact
from export.runtimes import Predict, Unavailable
from export.runtimes.onnxruntime import opened

FORMAT = "onnx"
PROVIDER = "CUDAExecutionProvider"
OPTIONS = {
    "use_tf32": "0",
    "prefer_nhwc": "1",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "enable_cuda_graph": "1",
}


def load(artifact: Artifact, device: str, threads: int) -> Predict:
    if device != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    classes = len(artifact.manifest["classes"])
    bound: dict[tuple[int, ...], Predict] = {}

    def predict(images: np.ndarray) -> np.ndarray:
        if images.shape not in bound:
            bound[images.shape] = _captured(artifact, threads, images, classes)
        return bound[images.shape](images)

    shape = artifact.entry["input"]["shape"][1:]
    predict(np.zeros([2, *shape], artifact.entry["input"]["dtype"]))
    return predict


def _captured(artifact: Artifact, threads: int, images: np.ndarray, classes: int) -> Predict:
    """For images of this shape alone."""
    session, name = opened(artifact, threads, PROVIDER, OPTIONS, tried=False)
    given = onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0)
    answer = onnxruntime.OrtValue.ortvalue_from_shape_and_type([len(images), classes], np.float32, "cuda", 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input(name, given)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, answer)

    def predict(images: np.ndarray) -> np.ndarray:
        given.update_inplace(images)
        session.run_with_iobinding(binding)
        return answer.numpy()

    try:
        predict(images)
    except Exception as error:
        raise Unavailable(f"onnxruntime with a CUDA graph: {' '.join(str(error).split())[:300]}") from error
    return predict
