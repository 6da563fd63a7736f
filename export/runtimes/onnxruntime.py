"""onnxruntime on CPU, or on CUDA where its CUDA provider really computes."""

import numpy as np
import onnxruntime

from export import Artifact
from export.runtimes import Predict, Unavailable

FORMAT = "onnx"
CPU = "CPUExecutionProvider"


def load(artifact: Artifact, device: str, threads: int) -> Predict:
    if device == "cuda":
        session, name = opened(artifact, threads, "CUDAExecutionProvider", {"use_tf32": "0"})
    else:
        session, name = opened(artifact, threads, CPU, {})

    def predict(images: np.ndarray) -> np.ndarray:
        return session.run(None, {name: images})[0]

    return predict


def opened(
    artifact: Artifact, threads: int, provider: str, options: dict[str, str], tried: bool = True
) -> tuple[onnxruntime.InferenceSession, str]:
    """A session whose every node that provider computes, `tried` out, and the name of its input; else Unavailable."""
    how = onnxruntime.SessionOptions()
    how.intra_op_num_threads, how.inter_op_num_threads = threads, 1
    how.log_severity_level = 3
    # Idle threads must not take cycles from another runtime that is being measured.
    how.add_session_config_entry("session.force_spinning_stop", "1")
    how.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider != CPU:
        import torch  # noqa: F401  its CUDA libraries have to be loaded first

        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        # Without the CPU provider beside it, a node that this one cannot compute is an error and not slow.
        how.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(artifact.path, how, providers=[(provider, options)])
        if session.get_providers()[0] != provider:
            raise Unavailable(f"{provider} did not load; onnxruntime has {onnxruntime.get_available_providers()}")
        if others := elsewhere(session, provider):
            raise Unavailable(f"{len(others)} nodes are computed elsewhere: {', '.join(others[:5])}")
        taken = session.get_inputs()[0]
        kind = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[taken.type]
        if tried:  # it may load and still lack kernels
            session.run(None, {taken.name: np.zeros([2, *taken.shape[1:]], kind)})
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(f"onnxruntime with {provider}: {' '.join(str(error).split())[:300]}") from error
    return session, taken.name


def elsewhere(session: onnxruntime.InferenceSession, provider: str) -> list[str]:
    """Nodes that another provider computes, each with its name; an onnxruntime that cannot tell tells none."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    return [
        f"{node.name} ({part.ep_name})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
    ]
