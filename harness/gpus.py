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

if TYPE_CHECKING:
    import torch

DEVICES = ("nvidia[0-9]*", "dxg", "kfd")  # files of /dev


def usable() -> int:
    """GPUs of this machine that PyTorch can use; where Linux shows no device, that is known without importing it."""
    if sys.platform == "linux" and not any(True for name in DEVICES for _ in Path("/dev").glob(name)):
        return 0
    import torch

    return torch.cuda.device_count()


def unusable() -> str:
    """Why PyTorch uses none of the NVIDIA GPUs that are here; empty where it does, where there are none, and where they
    were hidden by CUDA_VISIBLE_DEVICES."""
    if usable() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    with _nvml() as (nvml, _):
        if nvml is None or not (count := nvml.nvmlDeviceGetCount()):
            return ""
    import torch

    built = torch.version.cuda
    return f"{count} NVIDIA GPUs are here, but PyTorch {torch.__version__} " + (
        f"for CUDA {built} cannot use them; see that the driver is new enough" if built else "was built without CUDA"
    )


def described() -> dict[str, Any]:
    """Driver, versions of CUDA and cuDNN, and each GPU of this machine; empty where there is none that PyTorch uses."""
    if not usable():
        return {}
    import torch

    found = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "count": torch.cuda.device_count()}
    found["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    with _nvml() as (nvml, reason):
        if nvml is None:
            return found | {"nvml": reason}
        devices = [_of(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
        return found | {"driver": nvml.nvmlSystemGetDriverVersion(), "devices": devices}


def describe(device: "torch.device") -> dict[str, Any]:
    """The GPU that is `device` in this process; what NVML does not tell is missing."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{properties.uuid}"
    told = {"name": properties.name, "uuid": uuid, "memory_bytes": properties.total_memory}
    told |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    with _nvml() as (nvml, reason):
        if nvml is None:
            return told | {"nvml": reason}
        with contextlib.suppress(nvml.NVMLError):  # a part of a GPU (MIG) has a UUID of another kind
            told = _of(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)) | told
        return told | {"driver": nvml.nvmlSystemGetDriverVersion()}


def peak_memory(device: "torch.device") -> dict[str, Any]:
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
    """The name of the GPUs of this machine, as PyTorch has it, asked without touching one; None where they differ or
    NVML does not tell."""
    with _nvml() as (nvml, _):
        if nvml is None:
            return None
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        names = {nvml.nvmlDeviceGetName(handle) for handle in handles}
        return names.pop() if len(names) == 1 else None


def _of(nvml: Any, handle: Any) -> dict[str, Any]:
    """Name, memory, clocks in MHz and power limit in W of one GPU; None where it does not tell."""

    def ask(question: Callable[[], Any]) -> Any:
        with contextlib.suppress(nvml.NVMLError):
            return question()
        return None

    limit = ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    return {
        "name": nvml.nvmlDeviceGetName(handle),
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "memory_bytes": ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total),
        "sm_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "sm_mhz_max": ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "memory_mhz": ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "memory_mhz_max": ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "power_limit_watts": None if limit is None else limit / 1000,
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
