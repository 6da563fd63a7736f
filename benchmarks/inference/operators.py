"""Time of a runtime by operator, which explains differences in speed between runtimes.

From onnxruntime's profile of its nodes and PyTorch's profile of its operators (self time). Profiling slows the calls
down, so only shares are compared, never these times with the benchmark's.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

# Kind of operator -> substrings of its names in the runtimes; the first kind that matches counts.
KINDS = {
    "to and from int8": ("quantizelinear",),
    "lookup": ("gather",),
    "convolution": ("conv",),
    "matrix product": ("gemm", "matmul", "addmm", "aten::mm", "linear"),
    "activation": ("mish", "relu", "tanh", "softplus", "exp", "sigmoid", "clamp"),
    "pooling": ("pool",),
    "batch norm": ("norm",),
    "layout and copies": ("reorder", "transpose", "reshape", "copy", "cast", "flatten", "contiguous", "as_strided"),
    "elementwise": ("mul", "add", "div", "min", "sub"),
}


def kind(operator: str) -> str:
    """Kind of an operator: a key of KINDS, or other."""
    name = operator.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def of_onnxruntime(path: Path, images: np.ndarray, threads: int, calls: int) -> dict[str, float]:
    """Seconds per call by operator, from a separate session with onnxruntime's profiler."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for _ in range(calls + 1):
            session.run(None, {name: images})
        events = json.loads(Path(session.end_profiling()).read_text())
    runs = sorted(e["ts"] for e in events if e["name"] == "model_run")
    found: dict[str, float] = {}
    for event in events:
        # The first call is not counted: it allocates.
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[1]:
            operator = event["args"]["op_name"]
            found[operator] = found.get(operator, 0.0) + event["dur"] * 1e-6 / calls
    return found


def of_torch(call, calls: int) -> dict[str, float]:
    """Seconds per call by operator, for any callable that runs PyTorch in this process."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            call()
    return {
        event.key: event.self_cpu_time_total * 1e-6 / calls
        for event in profiler.key_averages()
        if event.self_cpu_time_total > 0
    }
