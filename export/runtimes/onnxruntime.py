"""onnxruntime on CPU, or on CUDA where its CUDA provider really computes."""

import numpy as np
import onnxruntime

from export import Artifact
from export.runtimes import Predict, Unavailable

FORMAT = "onnx"


def load(artifact: Artifact, device: str, threads: int) -> Predict:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Idle threads must not take cycles from another runtime that is being measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list = ["CPUExecutionProvider"]
    if device == "cuda":
        import torch  # noqa: F401  its CUDA libraries have to be loaded first

        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        # Without the CPU provider beside it, a node that CUDA cannot compute is an error and not slow.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [("CUDAExecutionProvider", {"use_tf32": "0"})]
    try:
        session = onnxruntime.InferenceSession(artifact.path, options, providers=providers)
        if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise Unavailable(
                f"the CUDA provider did not load; onnxruntime has {onnxruntime.get_available_providers()}"
            )
        name = session.get_inputs()[0].name
        kind = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[session.get_inputs()[0].type]
        shape = [2, *session.get_inputs()[0].shape[1:]]
        session.run(None, {name: np.zeros(shape, kind)})  # a provider may load and still lack its kernels
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(f"onnxruntime on {device}: {' '.join(str(error).split())[:300]}") from error

    def predict(images: np.ndarray) -> np.ndarray:
        return session.run(None, {name: images})[0]

    return predict
