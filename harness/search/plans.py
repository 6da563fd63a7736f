"""Chooses execution plans for the trials of a run: measured once if enough training is planned, else by rule.

The choice is recorded in run.json and used for the whole run, so that its trials are comparable.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.config import Trial
from harness.run.directory import RunDirectory
from harness.run.progress import Progress
from harness.run.records import PlanChoice
from harness.run.storage import Json
from harness.training.autotuner import cached_choice, choose_in_process
from harness.training.execution import needs_compiler
from harness.training.network import build_network, summarize_network

# Measuring pays if the planned training takes at least this long, about the duration of a measurement. EAGER_STEPS
# models eager steps, by device: operations per second, and the minimum seconds per step, for launching its kernels.
MEASURED_FROM_SECONDS = 10.0
EAGER_STEPS = {"cpu": (1e12, 0.0), "cuda": (5e13, 2e-3)}


@dataclass(frozen=True)
class Placement:
    """Where the trials of a stage run: type of device, threads, number of concurrent trials, and the `machine`
    (execution.processor_name), None if unknown to this process."""

    device: str
    threads: int
    at_once: int
    machine: str | None


def choose_plans(
    configs: Sequence[Trial],
    of: int,
    run: RunDirectory,
    place: Placement,
    progress: Progress,
    elsewhere: Callable[..., Json],
) -> dict[str, PlanChoice]:
    """The execution plan of each architecture, as recorded in the run, or else chosen and recorded now.

    Measured with the first configuration of each architecture, if the training planned for `of` trials is long enough.
    `elsewhere` calls a function with the allocation and on the device of a trial.
    """
    recorded = run.recorded()
    plans = dict(recorded.plans)
    for config in {config.architecture: config for config in reversed(configs)}.values():
        cheap = config.compile != "auto" and not needs_compiler(config.compile)
        is_open = config.compile == "auto" or (cheap and config.memory_format == "auto")
        if config.architecture in plans or config.plan == "rule" or not is_open:
            continue
        started = time.monotonic()
        classes, side = len(recorded.data.classes), recorded.data.input_size
        images = of * config.epochs * recorded.data.train
        network = build_network(config, classes, side, restoring=True)
        macs = summarize_network(network, side).macs
        if eager_seconds(place.device, macs, images, config.batch_size) < MEASURED_FROM_SECONDS:
            choice = PlanChoice(by_rule="too little training to measure for")
        else:
            choice = _measured(config, classes, side, images / place.at_once, place, progress, elsewhere)
            speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in choice.images_per_second.items())
            what = choice.by_rule or f"{choice.compile} {choice.memory_format}; images/s: {speeds}"
            progress.line(f"plan for {config.architecture}: {what}")
        choice.seconds = time.monotonic() - started
        plans[config.architecture] = choice
        run.record_plan(config.architecture, choice)
    return plans


def _measured(
    config: Trial,
    classes: int,
    side: int,
    images: float,
    place: Placement,
    progress: Progress,
    elsewhere: Callable[..., Json],
) -> PlanChoice:
    """The plan from the cache, or measured now. `images`: to be trained on by each of the concurrent trials."""
    if place.machine is not None:
        known = cached_choice(config, classes, side, place.machine, images, place.threads)
        if known is not None:
            return known
    progress.status(f"measuring how {config.architecture} trains fastest on this device")
    arguments = config.model_dump(mode="json"), classes, side, place.device, place.threads, images
    try:
        return PlanChoice.model_validate(elsewhere(choose_in_process, *arguments))
    except Exception as error:  # whatever failed in that process: the rule always works
        return PlanChoice(by_rule=str(error).strip().splitlines()[-1])


def eager_seconds(device: str, macs: int, images: int, batch_size: int) -> float:
    """Estimated seconds to train on `images` images in eager steps; `macs`: multiply-adds of a forward pass of one."""
    rate, least = EAGER_STEPS[device]
    # Backward is about twice the work of forward, and a multiply-add two operations.
    return images / batch_size * max(least, 6.0 * macs * batch_size / rate)
