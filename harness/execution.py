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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import checkpoint, datasets, plugins, results
from harness.config import Trial
from harness.errors import BadInput

PARTS = ("compile", "memory_format")  # what may be measured
TOLERANCE = {"float32": 0.05, "bfloat16": 0.2, "float16": 0.1}  # of each gradient, relative to its norm
MARGIN = 0.03  # a plan must be so much faster than the rule's, or timing noise would choose
SHARE, LEAST_SECONDS = 0.03, 10.0  # what measuring may cost: of the planned training, or so many seconds
# At first, and from the cache. What is captured was compiled before, as the rule's plan.
COMPILE_SECONDS = {"off": (0.0, 0.0), "kernels": (16.0, 6.0), "default": (45.0, 15.0), "captured": (8.0, 8.0)}
ROUNDS = 5
COMPILER = {"cpu": ("CXX", "g++", "clang++"), "cuda": ("CC", "gcc", "clang", "cc")}  # what torch.compile calls


@dataclass(frozen=True)
class Plan:
    """`compile`: off; kernels (activations and poolings alone, on CPU); a mode of torch.compile for the network; or
    captured (the whole step as one CUDA graph). `source`: why so: rule, measured, or why what was measured is not
    followed here."""

    device: str
    precision: str
    compile: str
    memory_format: str
    threads: int
    source: str = field(default="rule", compare=False)

    @property
    def name(self) -> str:
        return f"{self.compile} {self.memory_format}"

    @classmethod
    def of(cls, trial: Trial, device: torch.device, chosen: Mapping[str, Any] | None = None) -> "Plan":
        """As the configuration says; what it leaves open as `choose` found, else by rule.

        What was measured for another device, precision or number of threads, or together with other fixed parts, does
        not count here. BadInput where the device cannot do what was asked.
        """
        rule = cls._by_rule(trial, device)
        if not chosen or "compile" not in chosen or trial.plan == "rule":
            return rule
        for part in ("device", "precision", "threads"):
            if chosen[part] != getattr(rule, part):
                return dataclasses.replace(rule, source=f"rule: measured with {part}={chosen[part]}")
        fixed = {part: getattr(trial, part) for part in PARTS if getattr(trial, part) != "auto"}
        if any(chosen[part] != value for part, value in fixed.items()):
            return dataclasses.replace(rule, source="rule: measured with other fixed parts")
        if chosen["compile"] != "off" and not compiler(device.type):
            return dataclasses.replace(rule, source=f"rule: no compiler here for {chosen['compile']}")
        return dataclasses.replace(rule, source="measured", **{part: chosen[part] for part in PARTS})

    @classmethod
    def _by_rule(cls, trial: Trial, device: torch.device) -> "Plan":
        precision, compile_mode, memory_format = trial.precision, trial.compile, trial.memory_format
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
    lock = FileLock(done.with_suffix(".lock"))
    if not done.exists():
        lock.acquire()
    try:
        if done.exists():
            lock.release()  # another one has compiled it meanwhile: all may load at once
        yield
        done.touch()
    finally:
        lock.release(force=True)


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
    rule = plans[0]
    if len(plans) == 1:
        return {"by_rule": "nothing to choose from"}
    shape = shape_key(trial, num_classes, input_size, device, rule.threads)
    eager = dataclasses.replace(rule, compile="off")
    present: dict[Plan, Candidate] = {}
    reasons: dict[Plan, str] = {}
    first_seconds: dict[Plan, float] = {}  # to build, compile and take two steps
    seconds, reference, short_of_time = LEAST_SECONDS, None, False
    for plan in dict.fromkeys([eager, *plans]):
        before = datasets.cache_folder("compiled") / platform.node() / f"{shape}-{plan.compile}.done"
        cost = COMPILE_SECONDS.get(plan.compile, (60.0, 20.0))[before.exists()]
        if plan not in (eager, rule) and time.perf_counter() - started + cost > seconds:
            reasons[plan] = f"may cost {cost:.0f} s, more than measuring may"
            short_of_time = True
            continue
        begun = time.perf_counter()
        try:
            with compiling(plan, shape):
                one = Candidate(plan, trial, num_classes, input_size, device)
                gradients = one.gradients()
        except Exception as error:
            reasons[plan] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            continue
        first_seconds[plan] = time.perf_counter() - begun
        one.time_round()
        if reference is None:
            reference = gradients
            seconds = max(seconds, SHARE * images * one.rounds[0] / trial.batch_size)
        difference = largest_difference(gradients, reference)
        if difference <= TOLERANCE[plan.precision]:
            present[plan] = one
        else:
            reasons[plan] = (
                f"does not compute the same: a gradient differs from eager's by {difference:.2g} of its norm"
            )
    present = {plan: one for plan, one in present.items() if plan in plans}
    for number in range(ROUNDS):
        best = min(one.seconds() for one in present.values())
        for one in present.values():
            in_time = number < 2 or time.perf_counter() - started < seconds
            if in_time and (number < 2 or one.seconds() < 1.2 * best):
                one.time_round()
    best_plan = min(present, key=lambda plan: present[plan].seconds())
    if rule in present and present[best_plan].seconds() > (1 - MARGIN) * present[rule].seconds():
        best_plan = rule
    choice = {
        "compile": best_plan.compile,
        "memory_format": best_plan.memory_format,
        **{part: getattr(rule, part) for part in ("device", "precision", "threads")},
        "images": images,
        "short_of_time": short_of_time,
        "images_per_second": {p.name: trial.batch_size / one.seconds() for p, one in present.items()},
        "first_seconds": {plan.name: first_seconds[plan] for plan in present},
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


def largest_difference(gradients: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Over the parameters: the norm of the difference over the reference's norm; one that is small among all of them
    (a bias before batch norm has none but rounding) is measured by theirs."""
    if len(gradients) != len(reference):
        return math.inf
    least = 0.01 * max(float(one.norm()) for one in reference)
    differences = [
        float((one - other.to(one.device)).norm()) / max(float(other.norm()), least)
        for one, other in zip(gradients, reference, strict=True)
    ]
    return math.inf if any(math.isnan(one) for one in differences) else max(differences)


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

    def gradients(self) -> list[torch.Tensor]:
        """Of one step with dropout off, whose random numbers compiled code draws in its own way; then a step of
        training as it is, so that what is timed later has run before."""
        from harness.step import Dropout

        self.network.train()
        dropouts = [m for m in self.network.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        compiled_dropouts = [m for m in self.network.modules() if isinstance(m, Dropout)]
        rates = [m.rate.clone() for m in compiled_dropouts]
        for plain in dropouts:
            plain.eval()
        for compiled in compiled_dropouts:
            compiled.rate.zero_()
        self.step(self.part, self.draws, 0.0)
        found = [p.grad.detach().float().clone() for p in self.network.parameters() if p.grad is not None]
        self.network.train()
        for compiled, rate in zip(compiled_dropouts, rates, strict=True):
            compiled.rate.copy_(rate)
        self.step(self.part, self.draws, 0.0).tolist()
        return found

    def time_round(self) -> None:
        """Adds the seconds a step, over at least 0.1 s."""
        count = max(1, math.ceil(0.1 / self.rounds[0])) if self.rounds else 1
        started = time.perf_counter()
        for _ in range(count):
            sums = self.step(self.part, self.draws, 0.0)
        sums.tolist()  # waits for the device
        self.rounds.append((time.perf_counter() - started) / count)

    def seconds(self) -> float:
        """Of a step in the fastest round: whatever else runs on the machine can only add to it."""
        return min(self.rounds)
