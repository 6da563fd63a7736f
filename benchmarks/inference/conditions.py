"""Conditions that would invalidate a measured speed: checked before and during the measurement."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from harness.config import BadInput

BUSY = 0.25  # cores that other processes may use before it is reported
BEYOND = 0.3  # cores that an arm may use beyond its number of threads
# Debugging settings, which change what is computed or add waits.
DEBUGGING = {
    "CUDA_LAUNCH_BLOCKING": "waits for each CUDA kernel",
    "TORCHDYNAMO_DISABLE": "turns torch.compile off",
    "TORCH_COMPILE_DISABLE": "turns torch.compile off",
    "TORCH_COMPILE_DEBUG": "traces compilation",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "disables compilation caches",
    "PYTHONDEVMODE": "checks Python at run time",
    "PYTHONMALLOC": "replaces Python's allocator",
    "ORT_DISABLE_ALL_OPTIMIZATION": "turns onnxruntime's optimisations off",
}


def check_no_debugging(environment: Mapping[str, str] = os.environ) -> None:
    """Raises BadInput where a debugging setting would distort the measurement."""
    for name, harm in DEBUGGING.items():
        value = environment.get(name, "")
        if value not in ("", "0"):
            raise BadInput(f"{name}={value}: the environment variable {harm}; unset it before a benchmark")
    if sys.flags.dev_mode or sys.gettrace() is not None:
        raise BadInput("python: runs in development mode or under a debugger; run the benchmark without")


def found_precision(path: Path) -> str | None:
    """Precision found in an exported file: int8, float16 or float32; None for formats that are not inspected."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        return "float32" if "F32" in kinds and not kinds & {"F16", "BF16"} else "float16"
    if path.suffix != ".onnx":
        return None
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    if any(node.op_type in ("QuantizeLinear", "QLinearConv", "ConvInteger") for node in graph.node):
        return "int8"
    half = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    return "float16" if any(i.data_type in half for i in graph.initializer) else "float32"


class Others:
    """Cores that processes other than the measured one use, from the system's counters."""

    def __init__(self) -> None:
        self.before = _busy_seconds()

    def cores(self, own: float, seconds: float) -> float:
        """Cores used by other processes since the last call, while the measured process used `own` cores for `seconds`;
        includes time stolen by a hypervisor."""
        now = _busy_seconds()
        taken = now - self.before - own * seconds
        self.before = now
        return max(0.0, taken / seconds)


def _busy_seconds() -> float:
    import psutil

    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
