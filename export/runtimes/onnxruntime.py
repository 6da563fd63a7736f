"""onnxruntime on CPU, or on CUDA if its CUDA provider computes every node (except shape arithmetic)."""

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

from export import Artifact
from export.runtimes import Served, Unavailable

if TYPE_CHECKING:
    import torch

FORMAT = "onnx"
CPU = "CPUExecutionProvider"
KINDS = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
TELLS = "get_provider_graph_assignment_info"


def load(artifact: Artifact, device: str, threads: int) -> Served:
    if device == "cuda":
        return served(opened(artifact, threads, "CUDAExecutionProvider", {"use_tf32": "0"}))
    return served(opened(artifact, threads, CPU, {}))


def served(session: onnxruntime.InferenceSession) -> Served:
    """Wrap a session; `on_device` binds its input and output to the memory of the tensors, without copies."""
    name, binding = session.get_inputs()[0].name, session.io_binding()

    def host(images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run(None, {name: images})[0]
        return logits

    def on_device(images: "torch.Tensor") -> "torch.Tensor":
        logits = bind(binding, session, images)
        if images.is_cuda:
            import torch

            torch.cuda.current_stream().synchronize()  # onnxruntime computes on its own stream
        session.run_with_iobinding(binding)  # returns when the logits are complete
        return logits

    return Served(host, on_device)


def bind(binding: Any, session: onnxruntime.InferenceSession, images: "torch.Tensor") -> "torch.Tensor":
    """Bind a session's input to the memory of `images`, and its output to that of the returned logits [N, classes].

    Raises ValueError where the images are not contiguous.
    """
    import torch  # not imported where only host arrays are used

    if not images.is_contiguous():
        raise ValueError(f"images with strides {images.stride()}: onnxruntime needs contiguous tensors")
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    logits = torch.empty((len(images), found.shape[1]), device=images.device)
    where = images.device.type, images.device.index or 0
    binding.bind_input(given.name, *where, KINDS[given.type], tuple(images.shape), images.data_ptr())
    binding.bind_output(found.name, *where, np.float32, tuple(logits.shape), logits.data_ptr())
    return logits


def opened(
    artifact: Artifact, threads: int, provider: str, options: dict[str, str], tried: bool = True
) -> onnxruntime.InferenceSession:
    """A session whose nodes, except shape arithmetic, all run in `provider`; `tried`: called once to test it.

    Raises Unavailable where onnxruntime cannot create it or another provider computes some node.
    """
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
        if not hasattr(onnxruntime.InferenceSession, TELLS):
            # This onnxruntime does not report which provider computes a node: without the CPU fallback, a node that
            # the provider cannot compute is an error instead of slow.
            how.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(artifact.path, how, providers=[(provider, options)])
        session.disable_fallback()  # otherwise a failed call is silently repeated with other providers
        if session.get_providers()[0] != provider:
            raise Unavailable(f"{provider} did not load; onnxruntime has {onnxruntime.get_available_providers()}")
        if provider != CPU and (others := elsewhere(session, provider, onnx.load(artifact.path))):
            raise Unavailable(f"{len(others)} nodes are computed by another provider: {', '.join(others[:5])}")
        taken = session.get_inputs()[0]
        if tried:  # a session may load and still lack kernels
            session.run(None, {taken.name: np.zeros([2, *taken.shape[1:]], KINDS[taken.type])})
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(f"onnxruntime with {provider}: {' '.join(str(error).split())[:300]}") from error
    return session


def elsewhere(session: onnxruntime.InferenceSession, provider: str, model: onnx.ModelProto) -> list[str]:
    """Nodes that another provider computes, each with that provider's name, except `shape_nodes`: a few integers,
    which onnxruntime computes on the CPU for every provider. Empty where onnxruntime does not report it."""
    if not hasattr(session, TELLS):
        return []
    shapes = shape_nodes(model)
    return [
        f"{node.name} ({part.ep_name})"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.name not in shapes
    ]


def shape_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes whose inputs are only tensor shapes and constants: they process no image data."""
    graph = model.graph
    constants = {"", *(tensor.name for tensor in graph.initializer)}
    shapes, names = set[str](), set[str]()
    for node in graph.node:  # in topological order
        inputs = set(node.input) - constants
        if node.op_type == "Constant":
            constants |= set(node.output)
        elif node.op_type in ("Shape", "Size") or (inputs and inputs <= shapes):
            shapes |= set(node.output)
            names.add(node.name)
    return names - {""}
