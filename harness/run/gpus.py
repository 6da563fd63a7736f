"""Which NVIDIA GPUs a machine has: how many PyTorch can use, and what the driver says of them.

Results name the GPU that they were measured on; what they say of it comes from here. The driver is asked through NVML,
which takes no memory of a GPU. Without a GPU nothing is imported.
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
    """GPUs of this machine that PyTorch can use; where Linux shows no device, that is known without importing it."""
    if sys.platform == "linux" and not any(True for name in DEVICES for _ in Path("/dev").glob(name)):
        return 0
    import torch

    # device_count asks NVML, which also counts GPUs whose driver is too old for this PyTorch.
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def unusable() -> str:
    """Why PyTorch uses none of the NVIDIA GPUs that are here; empty where it does, where there are none, and where they
    were hidden by CUDA_VISIBLE_DEVICES."""
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
    """Driver, versions of CUDA and cuDNN, and each GPU of this machine; empty where there is none that PyTorch uses."""
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
    """The GPU that is `device` in this process; what NVML does not tell is missing."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{properties.uuid}"
    told = {"name": properties.name, "uuid": uuid, "memory_bytes": properties.total_memory}
    told |= _libraries()
    with _nvml() as (nvml, reason):
        if nvml is None:
            return told | {"nvml": reason}
        handle = _ask(nvml, nvml.nvmlDeviceGetHandleByUUID, uuid)  # a part of a GPU (MIG) has one of another kind
        told = (_of(nvml, handle) if handle is not None else {}) | told
        return told | {"driver": _ask(nvml, nvml.nvmlSystemGetDriverVersion)}


def peak_memory(device: "torch.device") -> Json:
    """What this process held at most of the device's memory since torch.cuda.reset_peak_memory_stats, in bytes: its
    tensors, and with them what PyTorch's allocator keeps. Nothing for a CPU."""
    if device.type != "cuda":
        return {}
    import torch

    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


@functools.cache
def common_name() -> str | None:
    """The name of the GPUs of this machine, as PyTorch has it, asked without touching one.

    None where they differ, where one is divided (MIG), and where NVML does not tell.
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
    """NVML's answer, None where it has none: a GPU may be lost, closed to this process, or not know what is asked."""
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
    """(pynvml, "") while it is initialised, or (None, why it is not there)."""
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
