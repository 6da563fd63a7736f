"""Learning-rate schedules."""

import math

from harness.config import Schedule


def learning_rate_factor(schedule: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Learning rate as a fraction of the peak rate, at the 0-based `step` of `total_steps`.

    one_cycle equals torch.optim.lr_scheduler.OneCycleLR with its defaults (30 % cosine rise from 1/25, cosine fall
    to 1/250,000), as in Smith and Topin, arXiv 1708.07120.
    """
    if schedule.name == "one_cycle":
        peak = 0.3 * total_steps - 1
        if step <= peak:
            return _cosine(1 / 25, 1.0, step / max(peak, 1))
        return _cosine(1.0, 1 / 250_000, (step - peak) / max(total_steps - 1 - peak, 1))
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total_steps - warmup, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": _cosine(1.0, 0.0, done)}[schedule.name]


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
