"""This machine: its name, cores, package versions, compilers, and native bfloat16 support."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.run import gpus
from harness.run.storage import Json, JsonFile

if TYPE_CHECKING:
    import torch


class Environment(JsonFile):
    """A machine: name, system, processor, usable cores, package versions and GPUs (harness/run/gpus.py)."""

    host: str
    system: str
    python: str
    cpu: str
    cores: int
    versions: dict[str, str]
    gpus: Json


@functools.cache
def environment() -> Environment:
    """Describe this machine; imports torch only if there are GPUs."""
    versions = {}
    for name in ("torch", "torchvision", "ray", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return Environment(
        host=platform.node(),
        system=platform.platform(),
        python=sys.version.split()[0],
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        versions=versions,
        gpus=gpus.describe_all(),
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


COMPILER = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang", "cc")}  # what torch.compile tries


def compiler(device: str) -> str | None:
    """Path of the compiler that torch.compile calls, else None: C++ for the CPU, C for Triton's launchers on CUDA."""
    variable, *names = COMPILER[device]
    return next((found for name in (os.environ.get(variable), *names) if name and (found := shutil.which(name))), None)


def native_bfloat16(device: "torch.device") -> bool:
    """Whether the device has bfloat16 instructions."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # absent in old torch
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
