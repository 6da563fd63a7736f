"""`dry_run=true`: what a command would run and about how long it would take on this machine."""

import time
from typing import TYPE_CHECKING

from harness.config import Trial
from harness.run.directory import RunDirectory
from harness.run.progress import Progress, duration
from harness.search.resolution import Resolved
from harness.search.trials import TrialGenerator, TrialSpec
from harness.stats.sequential import SEEDS
from harness.training.network import build_network

if TYPE_CHECKING:
    from harness.data.splits import Dataset


MEASURE_SECONDS = 2.0


def print_estimate(resolved: Resolved, planner: TrialGenerator, data: "Dataset", progress: Progress) -> None:
    """Print a line per trial, then the cost: images, TFLOP, and time from steps of the first network timed here."""
    search = resolved.config.search
    run = RunDirectory(resolved.run)
    done = {r.id for r in run.trials() if r.is_done}
    optuna = search.algorithm == "optuna" and bool(resolved.space.parameters)
    trials = [planner.trial("search", {})] * search.samples if optuna else planner.search_trials()
    progress.line(f"run {run.path}")
    if optuna:
        progress.line(f"search: {search.samples} samples, as Optuna suggests them")
    else:
        for planned in trials:
            changes = " ".join(f"trial.{k}={v}" for k, v in planned.parameters.items()) or "base configuration"
            state = "done before" if planned.id in done else "to run"
            name = planned.variant or f"sample {planned.index}"
            progress.line(f"  {planned.id} {name}, seed {planned.seed}: {state}; {changes}")
    if search.seeds == "auto" and resolved.space.variants:
        progress.line(
            f"search.seeds=auto: variants of claims still open then get up to {SEEDS[-1]} seeds, not counted here"
        )
    todo = trials if optuna else [planned for planned in trials if planned.id not in done]
    confirm = min(search.confirm, len(trials)) * search.confirm_seeds
    if resolved.space.variants or len(trials) < 2:
        confirm = 0
    progress.line(f"search: {len(todo)} trials to run; confirm: {confirm}")
    if not todo and not confirm:
        return
    speed, seconds_per_mac = _measure(trials[0].config, data, resolved.config.resources.device)
    images, work = 0, 0.0
    for planned, count in [*[(one, 1) for one in todo], (trials[0], confirm)]:
        own_images = count * planned.config.epochs * _images_an_epoch(planned, data)
        images += own_images
        work += own_images * _macs(planned.config, data)
    progress.line(
        f"cost: at most {images:,} images, {6 * work / 1e12:,.1f} TFLOP; about {duration(work * seconds_per_mac)} on "
        f"this machine at the {speed:,.0f} images/s of the first trial's network (export and benchmark not included)"
    )


def _images_an_epoch(planned: TrialSpec, data: "Dataset") -> int:
    """Training images plus a third of the validation images: a forward pass costs a third of a step."""
    return len(data.train) + planned.config.validations_per_epoch * len(data.validation) // 3


def _macs(config: Trial, data: "Dataset") -> int:
    from harness.training.network import summarize_network

    return summarize_network(build_network(config, len(data.classes), data.input_size), data.input_size).macs


def _measure(config: Trial, data: "Dataset", device_name: str) -> tuple[float, float]:
    """(images per second, seconds per image and multiply-add) of training steps on this machine's first device."""
    import torch

    from harness.data.augmentation import Draws
    from harness.data.batches import DeviceSplit, pick_device
    from harness.training.execution import ExecutionPlan
    from harness.training.step import make_step

    device = pick_device(device_name)
    side = data.input_size
    network = build_network(config, len(data.classes), side)
    step = make_step(network.train(), config, ExecutionPlan.of(config, device), device)
    rows = torch.arange(config.batch_size, device=device)
    images = torch.zeros(config.batch_size, side, side, 3, dtype=torch.uint8, device=device)
    part = DeviceSplit(images, torch.zeros_like(rows), rows)
    draws = Draws.of(rows, config, 0)
    for _ in range(2):
        step(part, draws, 0.0).tolist()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < MEASURE_SECONDS:
        step(part, draws, 0.0).tolist()
        count += 1
    speed = count * config.batch_size / (time.perf_counter() - started)
    return speed, 1 / (speed * _macs(config, data))
