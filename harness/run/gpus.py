"""The NVIDIA GPUs of a machine: how many PyTorch can use, and their description by the driver.

Results record the GPU that they were measured on, as described here. The driver is queried through NVML, which uses no
GPU memory. Without a GPU neither torch nor pynvml is imported.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.run.storage import Json

if TYPE_CHECKING:
    import torch


DEVICES = ("nvidia[0-9]*", "dxg", "kfd")  # files of /dev


def usable() -> int:
    """Number of GPUs that PyTorch can use; 0 without importing torch where Linux has no device file."""
    if sys.platform == "linux" and not any(True for name in DEVICES for _ in Path("/dev").glob(name)):
        return 0
    import torch

    # device_count asks NVML, which also counts GPUs whose driver is too old for this PyTorch.
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def unusable() -> str:
    """Why PyTorch can use none of the NVIDIA GPUs of this machine; empty if it can use one, there is none, or
    CUDA_VISIBLE_DEVICES hides all."""
    if usable() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    with _nvml() as (nvml, _):
        count = 0 if nvml is None else _ask(nvml, nvml.nvmlDeviceGetCount)
    if not count:
        return ""
    import torch

    found = f"{count} NVIDIA GPUs are here, but PyTorch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{found} was built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    advice = "see that the driver is new enough" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}"
    return f"{found} for CUDA {torch.version.cuda} cannot use them; {advice}"


def describe_all() -> Json:
    """Driver, CUDA and cuDNN versions, and each GPU of this machine; empty if PyTorch can use none."""
    if not usable():
        return {}
    import torch

    found = _libraries() | {"count": torch.cuda.device_count()}
    found["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    with _nvml() as (nvml, reason):
        if nvml is None:
            return found | {"nvml": reason}
        count = _ask(nvml, nvml.nvmlDeviceGetCount) or 0
        handles = [_ask(nvml, nvml.nvmlDeviceGetHandleByIndex, i) for i in range(count)]
        devices = [_of(nvml, handle) for handle in handles if handle is not None]
        return found | {"driver": _ask(nvml, nvml.nvmlSystemGetDriverVersion), "devices": devices}


def _libraries() -> Json:
    """Versions of CUDA and cuDNN."""
    import torch

    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]


def describe(device: "torch.device") -> Json:
    """Describe the GPU that is `device` in this process, without the fields that NVML does not provide."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{properties.uuid}"
    told = {"name": properties.name, "uuid": uuid, "memory_bytes": properties.total_memory}
    told |= _libraries()
    with _nvml() as (nvml, reason):
        if nvml is None:
            return told | {"nvml": reason}
        handle = _ask(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid)  # a MIG instance has a UUID of another kind
        told = (_of(nvml, handle) if handle is not None else {}) | told
        return told | {"driver": _ask(nvml, nvml.nvmlSystemGetDriverVersion)}


def peak_memory(device: "torch.device") -> Json:
    """Peak device memory of this process since torch.cuda.reset_peak_memory_stats, in bytes: allocated by tensors, and
    reserved by PyTorch's allocator. Empty for a CPU."""
    if device.type != "cuda":
        return {}
    import torch

    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


@functools.cache
def common_name() -> str | None:
    """The common name of this machine's GPUs, as in PyTorch, queried without initialising CUDA.

    None where the names differ, where a GPU is partitioned (MIG), and where NVML does not know.
    """
    with _nvml() as (nvml, _):
        if nvml is None:
            return None
        names = set()
        for i in range(_ask(nvml, nvml.nvmlDeviceGetCount) or 0):
            handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, i)
            if handle is None or any(_ask(nvml, nvml.nvmlDeviceGetMigMode, handle) or []):
                return None
            names.add(_ask(nvml, nvml.nvmlDeviceGetName, handle))
        return names.pop() if len(names) == 1 else None


def _ask(nvml: Any, question: Callable[..., Any], *about: Any) -> Any:
    """Query NVML; None on errors: a GPU may be lost, not permitted to this process, or not support the query."""
    with contextlib.suppress(nvml.NVMLError):
        return question(*about)
    return None


def _of(nvml: Any, handle: Any) -> Json:
    """Name, memory, clocks in MHz and power limit in W of one GPU."""
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    limit = _ask(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    return {
        "name": _ask(nvml, nvml.nvmlDeviceGetName, handle),
        "uuid": _ask(nvml, nvml.nvmlDeviceGetUUID, handle),
        "memory_bytes": memory and memory.total,
        "sm_mhz": _ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        "sm_mhz_max": _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": _ask(nvml, nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        "memory_mhz_max": _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM),
        "power_limit_watts": limit and limit / 1000,
    }


@contextlib.contextmanager
def _nvml() -> Iterator[tuple[Any, str]]:
    """(pynvml, "") while NVML is initialised, or (None, why it is not available)."""
    try:
        import pynvml
    except ImportError as error:
        yield None, f"{type(error).__name__}: {error}"
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield None, str(error)
        return
    try:
        yield pynvml, ""
    finally:
        pynvml.nvmlShutdown()
