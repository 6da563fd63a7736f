"""How a trial's step is executed on a device: fixed by the user, as measured (autotuner.py), or by rule.

Also prepares worker processes: cache of compiled code, memory allocation, one compiling process at a time.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from harness.config import BadInput, Trial
from harness.run import system
from harness.run.cache import compiled_folder
from harness.run.provenance import code_digest
from harness.run.records import PlanChoice
from harness.run.system import compiler, native_bfloat16

PARTS = ("compile", "memory_format")  # settings that the autotuner may choose


@dataclass(frozen=True)
class ExecutionPlan:
    """`compile`: off; kernels (harness/cpu_kernels, CPU only); a mode of torch.compile for the network; or the whole
    step as one CUDA graph, with the network eager (captured-eager) or compiled (captured). `source`: rule, measured,
    or the reason why a measured choice does not apply here."""

    device: str
    precision: str
    compile: str
    memory_format: str
    threads: int
    source: str = field(default="rule", compare=False)

    @property
    def name(self) -> str:
        return f"{self.compile} {self.memory_format}"

    @property
    def traces(self) -> bool:
        """Whether torch.compile generates code, at the first step."""
        return needs_compiler(self.compile) and self.compile != "kernels"

    @property
    def captured(self) -> bool:
        """Whether the whole step is one CUDA graph."""
        return self.compile.startswith("captured")

    @property
    def mode(self) -> str:
        """The mode passed to torch.compile, where `traces`."""
        return "default" if self.captured else self.compile

    @classmethod
    def of(cls, trial: Trial, device: torch.device, chosen: PlanChoice | None = None) -> "ExecutionPlan":
        """The plan of a trial: settings fixed by the configuration, the others as the autotuner chose, else by rule.

        A choice measured for another device, precision or number of threads, or with other fixed settings, is ignored.
        Raises BadInput where the device or machine does not support a fixed setting.
        """
        rule = cls._by_rule(trial, device)
        if chosen is None or not chosen.compile or trial.plan == "rule":
            return rule
        for part in ("device", "precision", "threads"):
            if (measured := getattr(chosen, part)) != getattr(rule, part):
                return dataclasses.replace(rule, source=f"rule: measured with {part}={measured}")
        fixed = {part: getattr(trial, part) for part in PARTS if getattr(trial, part) != "auto"}
        if any(getattr(chosen, part) != value for part, value in fixed.items()):
            return dataclasses.replace(rule, source="rule: the measured plan has another compile or memory_format")
        if needs_compiler(chosen.compile) and not compiler(device.type):
            return dataclasses.replace(rule, source=f"rule: no compiler here for {chosen.compile}")
        return dataclasses.replace(rule, source="measured", **{part: getattr(chosen, part) for part in PARTS})

    @classmethod
    def _by_rule(cls, trial: Trial, device: torch.device) -> "ExecutionPlan":
        precision, compile_mode, memory_format = trial.precision, trial.compile, trial.memory_format
        if precision == "auto":
            precision = "bfloat16" if native_bfloat16(device) else "float32"
        if precision == "float16" and device.type != "cuda":
            raise BadInput("trial.precision=float16: needs a CUDA device; use bfloat16 or float32 on CPU")
        if compile_mode == "auto":
            compile_mode = "off"  # other modes cost compilation time, so only a measurement selects them
        if memory_format == "auto":
            memory_format = "channels_last"
        if needs_compiler(compile_mode) and not compiler(device.type):
            raise BadInput(f"trial.compile={compile_mode}: no C++ compiler on this machine; install g++ or use off")
        if compile_mode == "kernels" and (device.type != "cpu" or memory_format != "channels_last"):
            raise BadInput("trial.compile=kernels: needs a CPU and memory_format=channels_last; use default or off")
        if compile_mode.startswith("captured") and device.type != "cuda":
            raise BadInput(f"trial.compile={compile_mode}: needs a CUDA device; use kernels or off on CPU")
        return cls(device.type, precision, compile_mode, memory_format, torch.get_num_threads())


def needs_compiler(compile_mode: str) -> bool:
    """Whether trial.compile=`compile_mode` compiles code: torch.compile's or the project's own kernels."""
    return compile_mode not in ("off", "captured-eager")


def prepare_process(threads: int) -> None:
    """Prepare this process for training with `threads` threads: put compiled code into this user's cache on this node
    and retain freed memory for reuse. Call it before torch._dynamo is imported, which reads these settings once.

    By default glibc returns large freed blocks to the system, so that each step page-faults its activations again.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_folder())
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else each process compiles a test of the vector ISA
    # Else each process starts one compiler per core of the node, whose cores are shared by several trials.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(2, threads)))
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        most_mapped, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(most_mapped, 0)
        libc.mallopt(trim_threshold, 1 << 30)


def compiled_mark(plan: ExecutionPlan, shape: str) -> Path:
    """Marker file: exists once a network of that shape has been compiled on this node in the plan's mode."""
    return compiled_folder() / f"{shape}-{plan.mode}.done"


@contextlib.contextmanager
def compiling(plan: ExecutionPlan, shape: str) -> Iterator[None]:
    """Context of a trial's first step: one process of a node compiles a network of that `shape` (see `shape_key`); the
    other processes wait, then load the compiled code from the cache."""
    if not plan.traces:
        yield
        return
    from filelock import FileLock

    done = compiled_mark(plan, shape)
    lock = FileLock(done.with_suffix(".lock"))
    if not done.exists():
        lock.acquire()
    try:
        if done.exists():
            lock.release()  # compiled by another process: all may load at once
        yield
        done.touch()
    finally:
        lock.release(force=True)


def processor_name(device: torch.device) -> str:
    """Name of the GPU, or of this machine's CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else system.environment().cpu


def shape_key(trial: Trial, num_classes: int, input_size: int, machine: str, threads: int) -> str:
    """Digest of all that affects the speed of a trial's step on `machine` (see `processor_name`), except the plan."""
    environment = system.environment()
    decides = {"architecture", "options", "batch_size", "augmentation", "precision"}
    known = [
        *(machine, environment.cores, environment.versions, code_digest(trial.architecture)),
        *(trial.model_dump(mode="json", include=decides), trial.optimizer.name, num_classes, input_size),
        threads,
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Autocast context for that precision; none for float32."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, DTYPES[precision])
