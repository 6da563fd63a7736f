"""Which plan of execution is the fastest for a network on a device: measured once a run, kept for the whole of it.

A plan never chooses precision: speed is no reason to compute something else. `choose` times real steps of the
candidates, checks that they compute the same, and remembers its choice in the cache; `plans_of_run` says for which
architectures of a run that is worth while, and records it.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from architectures._summary import summarize
from harness import checkpoint, datasets, execution, native, plugins, results
from harness.batches import Draws, Part
from harness.config import Trial
from harness.execution import Plan, compiled_mark, compiler, compiling, machine_name, needs_compiler, shape_key
from harness.progress import Progress
from harness.step import Dropout, make_step

TOLERANCE = {"float32": 0.05, "bfloat16": 0.2, "float16": 0.1}  # of each gradient, relative to its norm
MARGIN = 0.03  # a plan must be so much faster than the rule's, or timing noise would choose
SHARE, LEAST_SECONDS = 0.03, 10.0  # what measuring may cost: of the planned training, or so many seconds
# Until a plan can be timed: at first, and from the cache.
COMPILE_SECONDS = {
    "off": (0.0, 0.0),
    "kernels": (8.0, 0.0),
    "captured-eager": (2.0, 2.0),
    "default": (45.0, 15.0),
    "captured": (47.0, 17.0),
}
ROUNDS = 5
# Planned training is measured for where it takes about so long: a measurement does too. In eager steps, of which each
# does so many operations a second but takes so many seconds at least, which is what launching its kernels takes.
MEASURED_FROM_SECONDS = 10.0
EAGER_STEPS = {"cpu": (1e12, 0.0), "cuda": (5e13, 2e-3)}


@dataclass(frozen=True)
class Place:
    """Where the trials of a stage run: kind of device, threads, how many at once; on which `machine`
    (execution.machine_name), None where this process does not know."""

    device: str
    threads: int
    at_once: int
    machine: str | None


def plans_of_run(
    configs: Sequence[Trial],
    of: int,
    run: results.RunDirectory,
    place: Place,
    progress: Progress,
    elsewhere: Callable[..., dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """How the trials of each architecture run: as recorded in the run, or as decided and recorded now.

    Where the training that is planned for `of` trials is long enough, it is measured on the first configuration of
    each architecture; else the rule decides. Either way it stays so for the whole run. `elsewhere` calls a function
    where a trial would run.
    """
    recorded = run.configuration()
    assert recorded is not None
    data, plans = recorded["data"], recorded.get("plans", {})
    for config in {config.architecture: config for config in reversed(configs)}.values():
        cheap = config.compile != "auto" and not needs_compiler(config.compile)
        is_open = config.compile == "auto" or (cheap and config.memory_format == "auto")
        if config.architecture in plans or config.plan == "rule" or not is_open:
            continue
        started = time.monotonic()
        classes, side = len(data["classes"]), data["input_size"]
        images, batch_size = of * config.epochs * data["train"], config.batch_size
        network = plugins.build_network(config, classes, side, restoring=True)
        expected = eager_seconds(place.device, summarize(network, side).macs, images, batch_size)
        if expected < MEASURED_FROM_SECONDS:
            choice: dict[str, Any] = {"by_rule": "too little training to measure for"}
        else:
            each = images / place.at_once
            known = None
            if place.machine is not None:
                known = remembered(config, classes, side, place.machine, each, place.threads)
            if known is not None:
                choice = known
            else:
                progress.status(f"measuring how {config.architecture} trains fastest on this device")
                arguments = config.model_dump(mode="json"), classes, side, place.device, place.threads, each
                try:
                    choice = elsewhere(choose_in_process, *arguments)
                except Exception as error:  # whatever became of that process: the rule is always there
                    choice = {"by_rule": str(error).strip().splitlines()[-1]}
            told = choice.get("by_rule") or f"{choice['compile']} {choice['memory_format']}; images/s: " + ", ".join(
                f"{name} {speed:,.0f}" for name, speed in choice["images_per_second"].items()
            )
            progress.line(f"plan for {config.architecture}: {told}")
        plans[config.architecture] = {**choice, "seconds": time.monotonic() - started}
        run.record("plans", config.architecture, plans[config.architecture])
    return plans


def eager_seconds(device: str, macs: int, images: int, batch_size: int) -> float:
    """About how long so many images take to train in eager steps; `macs`: multiply-adds of a forward pass of one."""
    rate, least = EAGER_STEPS[device]
    # Backward is about twice the work of forward, and a multiply-add two operations.
    return images / batch_size * max(least, 6.0 * macs * batch_size / rate)


def choose_in_process(
    config: dict[str, Any], classes: int, side: int, device: str, threads: int, images: float
) -> dict[str, Any]:
    """`choose` in a process of its own, prepared as one that trains."""
    torch.set_num_threads(threads)
    execution.prepare_process(threads)
    return choose(Trial.model_validate(config), classes, side, torch.device(device), images)


def candidates(trial: Trial, device: torch.device) -> list[Plan]:
    """Plans that leave what the configuration fixes, the rule's first."""
    rule = Plan.of(trial, device)
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


def choose(trial: Trial, num_classes: int, input_size: int, device: torch.device, images: float) -> dict[str, Any]:
    """The fastest plan for this network on this device, as Plan.of takes it, with all that was measured for it; or
    {by_rule: why} where there was nothing to choose from.

    `images`: how many one place for a trial is to train on in this run. What is open is measured with real steps, the
    candidates in turn. One that fails, computes something else or costs more than measuring may cost is left out, with
    the reason; what was compiled once costs less the next time.
    """
    started = time.perf_counter()
    machine, threads = machine_name(device), torch.get_num_threads()
    if (known := remembered(trial, num_classes, input_size, machine, images, threads)) is not None:
        return known
    plans = candidates(trial, device)
    rule = plans[0]
    if len(plans) == 1:
        return {"by_rule": "nothing to choose from"}
    shape = shape_key(trial, num_classes, input_size, machine, threads)
    eager = dataclasses.replace(rule, compile="off")
    present: dict[Plan, Candidate] = {}
    reasons: dict[Plan, str] = {}
    first_seconds: dict[Plan, float] = {}  # to build, compile and take two steps
    seconds, reference, short_of_time = LEAST_SECONDS, None, False
    for plan in dict.fromkeys([eager, *plans]):
        mark = native.library_file() if plan.compile == "kernels" else compiled_mark(plan, shape)
        cost = COMPILE_SECONDS[plan.compile][mark.exists()]
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
            if any(other.captured for other in list(reasons)[:-1]):  # CUDA may not have come out of that unharmed
                reasons[plan] += " (after a capture that failed)"
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
    if not present:
        return {"by_rule": "; ".join(f"{plan.name}: {reason}" for plan, reason in reasons.items())}
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
    checkpoint.write_json(_cache_file(trial, num_classes, input_size, machine, threads), choice)
    return choice


def remembered(
    trial: Trial, num_classes: int, input_size: int, machine: str, images: float, threads: int
) -> dict[str, Any] | None:
    """What `choose` found earlier on `machine`; None where time was short then, and more training is to come now."""
    file = _cache_file(trial, num_classes, input_size, machine, threads)
    try:
        known = checkpoint.read_json(file)
    except (OSError, ValueError):
        return None
    return known | {"from_cache": True} if images <= known["images"] or not known["short_of_time"] else None


def _cache_file(trial: Trial, num_classes: int, input_size: int, machine: str, threads: int) -> Path:
    fixed = f"{trial.compile}-{trial.memory_format}"
    shape = shape_key(trial, num_classes, input_size, machine, threads)
    return datasets.cache_folder("plans") / f"{shape}-{fixed}.json"


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
