"""Choice of the fastest execution plan for a network on a device, by timing real steps of each candidate.

The precision is never chosen here, as it would change the results. `choose_plan` checks that the candidates compute
the same gradients and caches its choice. harness/search/plans.py decides for which trials measuring pays off.
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

TOLERANCE = {"float32": 0.05, "bfloat16": 0.2, "float16": 0.1}  # largest difference of a gradient, relative to its norm
MARGIN = 0.03  # minimum gain over the rule's plan, so that timing noise does not decide
SHARE, LEAST_SECONDS = 0.03, 10.0  # limit for measuring: share of the planned training time, at least 10 s
# Seconds to compile a plan: without and with cached code.
COMPILE_SECONDS = {
    "off": (0.0, 0.0),
    "kernels": (8.0, 0.0),
    "captured-eager": (2.0, 2.0),
    "default": (45.0, 15.0),
    "captured": (47.0, 17.0),
}
ROUNDS = 5


def choose_in_process(config: Json, classes: int, side: int, device: str, threads: int, images: float) -> Json:
    """`choose_plan` for a separate process, with JSON data in and out; prepares the process as for training."""
    torch.set_num_threads(threads)
    execution.prepare_process(threads)
    return choose_plan(Trial.model_validate(config), classes, side, torch.device(device), images).to_json()


def candidate_plans(trial: Trial, device: torch.device) -> list[ExecutionPlan]:
    """Plans that agree with the settings fixed by the configuration; the rule's plan comes first."""
    rule = ExecutionPlan.of(trial, device)
    modes = ["off", "kernels", "default"] if device.type == "cpu" else ["off", "captured-eager", "default", "captured"]
    if trial.compile != "auto":
        modes = [rule.compile]
    elif not compiler(device.type):
        modes = [mode for mode in modes if not needs_compiler(mode)]
    formats = ["channels_last", "contiguous"] if trial.memory_format == "auto" else [rule.memory_format]
    # Compiled plans in one memory format only, to halve the cost. The most promising come first, as time is limited.
    plans = [rule, *(dataclasses.replace(rule, compile=mode, memory_format=formats[0]) for mode in modes)]
    cheap = [mode for mode in modes if not needs_compiler(mode)]
    plans += [dataclasses.replace(rule, compile=mode, memory_format=one) for one in formats[1:] for mode in cheap]
    return [plan for plan in dict.fromkeys(plans) if plan.compile != "kernels" or plan.memory_format == "channels_last"]


def choose_plan(trial: Trial, num_classes: int, input_size: int, device: torch.device, images: float) -> PlanChoice:
    """The fastest plan for this network on this device, for ExecutionPlan.of, with the measurements behind it;
    `by_rule` gives the reason where there was only one candidate plan.

    `images`: images (over all epochs) that each parallel trial slot trains on in this run. `left_out` gives the reason
    for each candidate that fails, computes different gradients or exceeds the time limit for measuring.
    """
    machine, threads = processor_name(device), torch.get_num_threads()
    if (known := cached_choice(trial, num_classes, input_size, machine, images, threads)) is not None:
        return known
    if len(candidate_plans(trial, device)) == 1:
        return PlanChoice(by_rule="only one candidate plan")
    measured = Measurement(trial, num_classes, input_size, device, images)
    measured.try_candidates()
    if not measured.present:
        return PlanChoice(by_rule="; ".join(f"{plan.name}: {reason}" for plan, reason in measured.reasons.items()))
    measured.time_in_turn()
    choice = measured.choice()
    choice.write(_cache_file(trial, num_classes, input_size, machine, threads))
    return choice


class Measurement:
    """Builds candidates, checks them against eager gradients, times them. `reasons`: why plans were left out."""

    def __init__(self, trial: Trial, num_classes: int, input_size: int, device: torch.device, images: float):
        self.trial, self.network_size, self.device, self.images = trial, (num_classes, input_size), device, images
        self.plans = candidate_plans(trial, device)
        self.rule = self.plans[0]
        self.shape = shape_key(trial, *self.network_size, processor_name(device), torch.get_num_threads())
        self.present: dict[ExecutionPlan, TimedPlan] = {}
        self.reasons: dict[ExecutionPlan, str] = {}
        self.first_seconds: dict[ExecutionPlan, float] = {}  # time to build, compile and run two steps
        self.started, self.may_take, self.short_of_time = time.perf_counter(), LEAST_SECONDS, False

    def try_candidates(self) -> None:
        """Build and check all; eager first: its gradients are the reference, its speed sets the time limit."""
        eager = dataclasses.replace(self.rule, compile="off")
        reference: Sequence[torch.Tensor] | None = None
        for plan in dict.fromkeys([eager, *self.plans]):
            mark = build.library_file() if plan.compile == "kernels" else compiled_mark(plan, self.shape)
            cost = COMPILE_SECONDS[plan.compile][mark.exists()]
            if plan not in (eager, self.rule) and self._spent() + cost > self.may_take:
                self.reasons[plan] = f"not measured: may take {cost:.0f} s, more than the limit for measuring"
                self.short_of_time = True
                continue
            begun = time.perf_counter()
            try:
                with compiling(plan, self.shape):
                    one = TimedPlan(plan, self.trial, *self.network_size, self.device)
                    gradients = one.gradients()
            except Exception as error:
                self.reasons[plan] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                if any(other.captured for other in list(self.reasons)[:-1]):  # CUDA may be in a bad state
                    self.reasons[plan] += " (perhaps because an earlier CUDA graph capture failed)"
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
                self.reasons[plan] = f"computes something else: {what}"
            elif plan in self.plans:
                self.present[plan] = one

    def time_in_turn(self) -> None:
        """Time the candidates in rounds within the time limit; clearly slower ones stop after two rounds."""
        for number in range(ROUNDS):
            best = min(one.seconds() for one in self.present.values())
            for one in self.present.values():
                in_time = number < 2 or self._spent() < self.may_take
                if in_time and (number < 2 or one.seconds() < 1.2 * best):
                    one.time_round()

    def choice(self) -> PlanChoice:
        """The fastest plan, or the rule's where the gain is within timing noise."""
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
    """The cached choice for `machine`; None where its time was short and more images are to be trained on now."""
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
    """Largest relative difference over the parameters: norm of the difference / norm of the reference, the latter at
    least 1 % of the largest reference norm (the gradient of a bias before batch norm is rounding error alone)."""
    if len(gradients) != len(reference):
        return math.inf
    least = 0.01 * max(float(one.norm()) for one in reference)
    differences = [
        float((one - other.to(one.device)).norm()) / max(float(other.norm()), least)
        for one, other in zip(gradients, reference, strict=True)
    ]
    return math.inf if any(math.isnan(one) for one in differences) else max(differences)


class TimedPlan:
    """One plan's step on random images of the right shape; every plan starts from the same weights."""

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
        """Gradients of one step with dropout off, as compiled code draws other random numbers; then one normal step,
        so that the timed code has been warmed up."""
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
        """Time steps for at least 0.1 s and append the seconds per step to `rounds`."""
        count = max(1, math.ceil(0.1 / self.rounds[0])) if self.rounds else 1
        started = time.perf_counter()
        for _ in range(count):
            sums = self.step(self.part, self.draws, 0.0)
        sums.tolist()  # waits for the device
        self.rounds.append((time.perf_counter() - started) / count)

    def seconds(self) -> float:
        """Seconds per step in the fastest round, as other load on the machine can only add time."""
        return min(self.rounds)
