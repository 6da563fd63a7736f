"""OpenVINO on CPU, in the precision of the file: an optional extra (`pip install -e '.[openvino]'`)."""

import numpy as np

from export import Artifact
from export.runtimes import Predict, Unavailable

FORMAT = "onnx"


def load(artifact: Artifact, device: str, threads: int) -> Predict:
    if device != "cpu":
        raise Unavailable("the OpenVINO runtime supports only the CPU")
    try:
        import openvino
    except ImportError as error:
        raise Unavailable("OpenVINO is not installed: pip install openvino") from error
    core = openvino.Core()
    how = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "f32",  # otherwise it uses bfloat16 where the CPU has it, regardless of the file
    }
    try:
        compiled = core.compile_model(core.read_model(artifact.path), "CPU", how)
    except Exception as error:
        raise Unavailable(f"OpenVINO: {' '.join(str(error).split())[:300]}") from error
    request = compiled.create_infer_request()

    def predict(images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = request.infer([images], share_inputs=True)[0]
        return logits.copy()

    return predict
