"""Which execution plan is the fastest for a network on a device: real steps of each candidate, timed in turn.

A plan never chooses the precision: speed is no reason to compute something else. `choose_plan` checks that the
candidates compute the same, and stores its choice in the cache. harness/search/plans.py decides for which trials
measuring pays.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from harness.config import Trial
from harness.cpu_kernels import build
from harness.data.augmentation import Draws
from harness.data.batches import DeviceSplit
from harness.run.cache import cache_folder
from harness.run.records import PlanChoice
from harness.run.storage import Json
from harness.run.system import compiler
from harness.training import execution
from harness.training.compilation import Dropout
from harness.training.execution import (
    ExecutionPlan,
    compiled_mark,
    compiling,
    needs_compiler,
    processor_name,
    shape_key,
)
from harness.training.network import build_network
from harness.training.step import make_step

TOLERANCE = {"float32": 0.05, "bfloat16": 0.2, "float16": 0.1}  # of each gradient, relative to its norm
MARGIN = 0.03  # a plan must be so much faster than the rule's, or timing noise would choose
SHARE, LEAST_SECONDS = 0.03, 10.0  # the most that measuring may cost: of the planned training, or so many seconds
# Until a plan can be timed: the first time, and from the cache.
COMPILE_SECONDS = {
    "off": (0.0, 0.0),
    "kernels": (8.0, 0.0),
    "captured-eager": (2.0, 2.0),
    "default": (45.0, 15.0),
    "captured": (47.0, 17.0),
}
ROUNDS = 5


def choose_in_process(config: Json, classes: int, side: int, device: str, threads: int, images: float) -> Json:
    """`choose_plan` in a process of its own, with plain data in and out, prepared as one that trains."""
    torch.set_num_threads(threads)
    execution.prepare_process(threads)
    return choose_plan(Trial.model_validate(config), classes, side, torch.device(device), images).to_json()


def candidate_plans(trial: Trial, device: torch.device) -> list[ExecutionPlan]:
    """Plans with what the configuration fixes; the rule's first."""
    rule = ExecutionPlan.of(trial, device)
    modes = ["off", "kernels", "default"] if device.type == "cpu" else ["off", "captured-eager", "default", "captured"]
    if trial.compile != "auto":
        modes = [rule.compile]
    elif not compiler(device.type):
        modes = [mode for mode in modes if not needs_compiler(mode)]
    formats = ["channels_last", "contiguous"] if trial.memory_format == "auto" else [rule.memory_format]
    # A compiled one in one format: two would cost twice as much. The most promising first, while there is time.
    plans = [rule, *(dataclasses.replace(rule, compile=mode, memory_format=formats[0]) for mode in modes)]
    cheap = [mode for mode in modes if not needs_compiler(mode)]
    plans += [dataclasses.replace(rule, compile=mode, memory_format=one) for one in formats[1:] for mode in cheap]
    return [plan for plan in dict.fromkeys(plans) if plan.compile != "kernels" or plan.memory_format == "channels_last"]


def choose_plan(trial: Trial, num_classes: int, input_size: int, device: torch.device, images: float) -> PlanChoice:
    """The fastest plan for this network on this device, as ExecutionPlan.of takes it, with all that was measured for
    it; `by_rule` says why where there was nothing to choose from.

    `images`: how many a trial's place is to train on in this run. A candidate that fails, computes something else or
    costs more than measuring may cost is left out, with the reason.
    """
    machine, threads = processor_name(device), torch.get_num_threads()
    if (known := cached_choice(trial, num_classes, input_size, machine, images, threads)) is not None:
        return known
    if len(candidate_plans(trial, device)) == 1:
        return PlanChoice(by_rule="nothing to choose from")
    measured = Measurement(trial, num_classes, input_size, device, images)
    measured.try_candidates()
    if not measured.present:
        return PlanChoice(by_rule="; ".join(f"{plan.name}: {reason}" for plan, reason in measured.reasons.items()))
    measured.time_in_turn()
    choice = measured.choice()
    choice.write(_cache_file(trial, num_classes, input_size, machine, threads))
    return choice


class Measurement:
    """Candidates built, checked against eager gradients, and timed. `reasons`: why candidates were left out."""

    def __init__(self, trial: Trial, num_classes: int, input_size: int, device: torch.device, images: float):
        self.trial, self.network_size, self.device, self.images = trial, (num_classes, input_size), device, images
        self.plans = candidate_plans(trial, device)
        self.rule = self.plans[0]
        self.shape = shape_key(trial, *self.network_size, processor_name(device), torch.get_num_threads())
        self.present: dict[ExecutionPlan, TimedPlan] = {}
        self.reasons: dict[ExecutionPlan, str] = {}
        self.first_seconds: dict[ExecutionPlan, float] = {}  # to build, compile and take two steps
        self.started, self.may_take, self.short_of_time = time.perf_counter(), LEAST_SECONDS, False

    def try_candidates(self) -> None:
        """Eager first: its gradients are the reference, and its speed says how long measuring may take."""
        eager = dataclasses.replace(self.rule, compile="off")
        reference: Sequence[torch.Tensor] | None = None
        for plan in dict.fromkeys([eager, *self.plans]):
            mark = build.library_file() if plan.compile == "kernels" else compiled_mark(plan, self.shape)
            cost = COMPILE_SECONDS[plan.compile][mark.exists()]
            if plan not in (eager, self.rule) and self._spent() + cost > self.may_take:
                self.reasons[plan] = f"may cost {cost:.0f} s, more than measuring may"
                self.short_of_time = True
                continue
            begun = time.perf_counter()
            try:
                with compiling(plan, self.shape):
                    one = TimedPlan(plan, self.trial, *self.network_size, self.device)
                    gradients = one.gradients()
            except Exception as error:
                self.reasons[plan] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                if any(other.captured for other in list(self.reasons)[:-1]):  # CUDA may be in a bad state since
                    self.reasons[plan] += " (after a capture that failed)"
                continue
            self.first_seconds[plan] = time.perf_counter() - begun
            one.time_round()
            if reference is None:
                reference = gradients
                seconds = SHARE * self.images * one.rounds[0] / self.trial.batch_size
                self.may_take = max(self.may_take, seconds)
            difference = largest_difference(gradients, reference)
            if difference > TOLERANCE[plan.precision]:
                what = f"a gradient differs from eager's by {difference:.2g} of its norm"
                self.reasons[plan] = f"does not compute the same: {what}"
            elif plan in self.plans:
                self.present[plan] = one

    def time_in_turn(self) -> None:
        """In rounds, as long as there is time; candidates that are clearly slower stop after two."""
        for number in range(ROUNDS):
            best = min(one.seconds() for one in self.present.values())
            for one in self.present.values():
                in_time = number < 2 or self._spent() < self.may_take
                if in_time and (number < 2 or one.seconds() < 1.2 * best):
                    one.time_round()

    def choice(self) -> PlanChoice:
        """The fastest, or the rule's where the gain is within timing noise."""
        best = min(self.present, key=lambda plan: self.present[plan].seconds())
        if self.rule in self.present:
            gains = self.present[best].seconds() <= (1 - MARGIN) * self.present[self.rule].seconds()
            best = best if gains else self.rule
        return PlanChoice(
            compile=best.compile,
            memory_format=best.memory_format,
            device=self.rule.device,
            precision=self.rule.precision,
            threads=self.rule.threads,
            images=self.images,
            short_of_time=self.short_of_time,
            images_per_second={p.name: self.trial.batch_size / one.seconds() for p, one in self.present.items()},
            first_seconds={plan.name: self.first_seconds[plan] for plan in self.present},
            left_out={plan.name: reason for plan, reason in self.reasons.items()},
        )

    def _spent(self) -> float:
        return time.perf_counter() - self.started


def cached_choice(
    trial: Trial, num_classes: int, input_size: int, machine: str, images: float, threads: int
) -> PlanChoice | None:
    """An earlier choice on `machine`; None where time was short then, and more training is to come now."""
    try:
        known = PlanChoice.read(_cache_file(trial, num_classes, input_size, machine, threads))
    except (OSError, ValueError):
        return None
    known.from_cache = True
    return known if images <= known.images or not known.short_of_time else None


def _cache_file(trial: Trial, num_classes: int, input_size: int, machine: str, threads: int) -> Path:
    fixed = f"{trial.compile}-{trial.memory_format}"
    shape = shape_key(trial, num_classes, input_size, machine, threads)
    return cache_folder("plans") / f"{shape}-{fixed}.json"


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


class TimedPlan:
    """One plan's step on random images of the right shape, from the same weights each time."""

    def __init__(self, plan: ExecutionPlan, trial: Trial, num_classes: int, input_size: int, device: torch.device):
        self.device = device
        self.rounds: list[float] = []
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(trial.batch_size, device=device)
        images = torch.randint(0, 256, (len(rows), input_size, input_size, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, num_classes, (len(rows),), generator=generator)
        self.part = DeviceSplit(images.to(device), labels.to(device), rows)
        self.draws = Draws.of(rows, trial, 0)
        torch.manual_seed(0)
        self.step = make_step(build_network(trial, num_classes, input_size), trial, plan, device)
        self.network = self.step.network

    def gradients(self) -> list[torch.Tensor]:
        """Of one step with dropout off, whose random numbers compiled code draws in its own way; then a step of
        training as it is, so that what is timed later has run before."""
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
        if dropouts:
            self.step.start_over()
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
