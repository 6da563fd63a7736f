"""How a trial's step is executed on a device: the plan, what `auto` comes to, and measuring which plan is fastest.

A plan never chooses precision: speed is no reason to compute something else. `Plan.of` decides by rule alone.
`choose` times real steps of the candidates on this device, checks that they compute the same, and remembers the
choice in the cache; a run asks it once, for all its trials.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import checkpoint, datasets, plugins, results
from harness.config import Trial
from harness.errors import BadInput

PARTS = ("compile", "memory_format")  # what may be measured
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}  # of the loss, relative, after two steps
MARGIN = 0.03  # a plan must be so much faster than the rule's, or timing noise would choose
SHARE, LEAST_SECONDS = 0.03, 10.0  # what measuring may cost: of the planned training, or so many seconds
COMPILE_SECONDS = {"off": (0.0, 0.0), "kernels": (16.0, 6.0), "default": (45.0, 15.0)}  # at first, from the cache
ROUNDS = 5
COMPILER = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang", "cc")}  # what torch.compile calls


@dataclass(frozen=True)
class Plan:
    """`compile`: off; kernels (activations and poolings alone, on CPU); a mode of torch.compile for the network; or
    captured (the whole step as one CUDA graph)."""

    device: str
    precision: str
    compile: str
    memory_format: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.compile} {self.memory_format}"

    @classmethod
    def of(cls, trial: Trial, device: torch.device, chosen: Mapping[str, str] | None = None) -> "Plan":
        """As the configuration says; what it leaves open as measured (`chosen`), else by rule.

        BadInput where the device cannot do what was asked.
        """
        precision, chosen = trial.precision, chosen or {}
        compile_mode = chosen.get("compile", "auto") if trial.compile == "auto" else trial.compile
        memory_format = chosen.get("memory_format", "auto") if trial.memory_format == "auto" else trial.memory_format
        if precision == "auto":
            precision = "bfloat16" if _native_bfloat16(device) else "float32"
        if precision == "float16" and device.type != "cuda":
            raise BadInput("trial.precision=float16: needs a CUDA device; use bfloat16 or float32 on CPU")
        if compile_mode == "auto":
            compile_mode = "default" if device.type == "cuda" and compiler(device.type) else "off"
        if memory_format == "auto":
            memory_format = "channels_last"
        if compile_mode != "off" and not compiler(device.type):
            raise BadInput(f"trial.compile={compile_mode}: no C++ compiler on this machine; install g++ or use off")
        if compile_mode == "kernels" and (device.type != "cpu" or memory_format != "channels_last"):
            raise BadInput("trial.compile=kernels: is for CPUs and memory_format=channels_last; use default or off")
        if compile_mode == "captured" and device.type != "cuda":
            raise BadInput("trial.compile=captured: needs a CUDA device; use kernels or off on CPU")
        return cls(device.type, precision, compile_mode, memory_format, torch.get_num_threads())


def compiler(device: str) -> str | None:
    """The compiler that torch.compile calls, if there is one: C++ for the CPU, C for Triton's launchers on CUDA."""
    variable, *names = COMPILER[device]
    return next((found for name in (os.environ.get(variable), *names) if name and (found := shutil.which(name))), None)


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in all supported ones
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def prepare_process() -> None:
    """For a process that trains: compiled code in this user's and node's own cache, and memory kept for reuse.

    By default glibc hands large freed blocks back to the system, so that each step faults its activations in anew.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = datasets.cache_folder("compiled") / platform.node()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else each process compiles a test of the CPU's vectors
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        most_mapped, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(most_mapped, 0)
        libc.mallopt(trim_threshold, 1 << 30)


@contextlib.contextmanager
def compiling(plan: Plan, shape: str) -> Iterator[None]:
    """Around a trial's first step. Of the processes of a node one compiles a network of that `shape` (see `shape_key`);
    the others wait, then load what it compiled from the cache."""
    if plan.compile == "off":
        yield
        return
    from filelock import FileLock

    folder = datasets.cache_folder("compiled") / platform.node()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    done = folder / f"{shape}-{plan.compile}.done"
    with contextlib.nullcontext() if done.exists() else FileLock(folder / "compiling.lock"):
        yield
    done.touch()


def candidates(trial: Trial, device: torch.device) -> list[Plan]:
    """Plans that leave what the configuration fixes, the rule's first."""
    rule = Plan.of(trial, device)
    modes = ["off", "kernels", "default"] if device.type == "cpu" else ["default", "captured", "off"]
    if trial.compile != "auto":
        modes = [rule.compile]
    elif not compiler(device.type):
        modes = ["off"]
    formats = ["channels_last", "contiguous"] if trial.memory_format == "auto" else [rule.memory_format]
    # A compiled one in one format: two would cost twice as much. The most promising first, while there is time.
    plans = [rule, *(dataclasses.replace(rule, compile=mode, memory_format=formats[0]) for mode in modes)]
    plans += [dataclasses.replace(rule, compile="off", memory_format=one) for one in formats[1:] if "off" in modes]
    return [plan for plan in dict.fromkeys(plans) if plan.compile != "kernels" or plan.memory_format == "channels_last"]


def choose(trial: Trial, num_classes: int, input_size: int, device: torch.device, images: float) -> dict[str, Any]:
    """The fastest plan for this network on this device: {compile, memory_format, measured}.

    `images`: how many one place for a trial is to train on in this run. What is open is measured with real steps, the
    candidates in turn. One that fails, computes something else or costs more than measuring may cost is left out, with
    the reason; what was compiled once costs less the next time.
    """
    started = time.perf_counter()
    if (known := remembered(trial, num_classes, input_size, device, images)) is not None:
        return known
    plans = candidates(trial, device)
    shape = shape_key(trial, num_classes, input_size, device, torch.get_num_threads())
    rule = plans[0]
    eager = dataclasses.replace(rule, compile="off")
    present: dict[Plan, Candidate] = {}
    reasons: dict[Plan, str] = {}
    seconds, reference, short_of_time = LEAST_SECONDS, None, False
    for plan in dict.fromkeys([eager, *plans]):
        before = datasets.cache_folder("compiled") / platform.node() / f"{shape}-{plan.compile}.done"
        cost = COMPILE_SECONDS.get(plan.compile, (60.0, 20.0))[before.exists()]
        if plan not in (eager, rule) and time.perf_counter() - started + cost > seconds:
            reasons[plan] = f"may cost {cost:.0f} s, more than measuring may"
            short_of_time = True
            continue
        try:
            with compiling(plan, shape):
                one = Candidate(plan, trial, num_classes, input_size, device)
                losses = one.losses()
        except Exception as error:
            reasons[plan] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            continue
        one.time_round()
        if reference is None:
            reference = losses
            seconds = max(seconds, SHARE * images * one.rounds[0] / trial.batch_size)
        if all(math.isclose(a, b, rel_tol=TOLERANCE[plan.precision]) for a, b in zip(losses, reference, strict=True)):
            present[plan] = one
        else:
            reasons[plan] = f"its losses {losses} are not those of eager, {reference}"
    present = {plan: one for plan, one in present.items() if plan in plans}
    for number in range(ROUNDS):
        best = min(present.values(), key=lambda one: one.median())
        for one in present.values():
            in_time = number < 2 or time.perf_counter() - started < seconds
            if in_time and one.median() < 1.2 * best.median():
                one.time_round()
    best_plan = min(present, key=lambda plan: present[plan].median())
    if rule in present and present[best_plan].median() > (1 - MARGIN) * present[rule].median():
        best_plan = rule
    choice = {
        "compile": best_plan.compile,
        "memory_format": best_plan.memory_format,
        "threads": rule.threads,
        "precision": rule.precision,
        "images": images,
        "short_of_time": short_of_time,
        "images_per_second": {p.name: trial.batch_size / one.median() for p, one in present.items()},
        "left_out": {plan.name: reason for plan, reason in reasons.items()},
    }
    checkpoint.write_json(_cache_file(trial, num_classes, input_size, device, rule.threads), choice)
    return choice


def remembered(
    trial: Trial, num_classes: int, input_size: int, device: torch.device, images: float, threads: int | None = None
) -> dict[str, Any] | None:
    """What `choose` found earlier on this machine; None where time was short then, and more training is to come now."""
    file = _cache_file(trial, num_classes, input_size, device, threads or torch.get_num_threads())
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return known | {"from_cache": True} if images <= known["images"] or not known["short_of_time"] else None


def _cache_file(trial: Trial, num_classes: int, input_size: int, device: torch.device, threads: int) -> Path:
    fixed = f"{trial.compile}-{trial.memory_format}"
    shape = shape_key(trial, num_classes, input_size, device, threads)
    return datasets.cache_folder("plans") / f"{shape}-{fixed}.json"


def shape_key(trial: Trial, num_classes: int, input_size: int, device: torch.device, threads: int) -> str:
    """Of all that decides how fast a trial's step is, but the plan."""
    environment = results.environment()
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else environment["cpu"]
    decides = {"architecture", "options", "batch_size", "augmentation", "precision"}
    known = [
        *(machine, environment["cores"], environment["versions"], results.code_digest(trial.architecture)),
        *(trial.model_dump(mode="json", include=decides), trial.optimizer.name, num_classes, input_size),
        threads,
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


class Candidate:
    """One plan's step on random images of the right shape, from the same weights each time."""

    def __init__(self, plan: Plan, trial: Trial, num_classes: int, input_size: int, device: torch.device):
        from harness.step import Draws, Part, make_step

        self.device = device
        self.rounds: list[float] = []
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(trial.batch_size, device=device)
        images = torch.randint(0, 256, (len(rows), input_size, input_size, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, num_classes, (len(rows),), generator=generator)
        self.part = Part(images.to(device), labels.to(device), rows)
        self.draws = Draws.of(rows, trial, 0)
        torch.manual_seed(0)
        self.step = make_step(plugins.build_network(trial, num_classes, input_size), trial, plan, device)
        self.network = self.step.network
        self.rate = trial.optimizer.lr / 100  # such that two steps of any optimiser stay comparable

    def losses(self) -> list[float]:
        """Of two steps with dropout off, whose random numbers compiled code draws in its own way."""
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        found = [float(self.step(self.part, self.draws, self.rate)[0]) for _ in range(2)]
        self.network.train()
        return found

    def time_round(self) -> None:
        """Adds the seconds a step, over at least 0.1 s."""
        started, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - started < 0.1:
            self.step(self.part, self.draws, 0.0)
            count += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        self.rounds.append((time.perf_counter() - started) / count)

    def median(self) -> float:
        return statistics.median(self.rounds)
