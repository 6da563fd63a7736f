"""Timing for test_speed.py: `time.perf_counter` around calls in this process that return results on the host.

Arms are measured in interleaved rounds, in a new random order each round, so that a change of the machine's speed
affects all of them. Ratios are paired by round. No arm knows which arm it is compared with.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

WARMUP_CALLS = 3
WARMUP_SECONDS = 0.2


@dataclass(frozen=True)
class Round:
    """`calls` calls of one arm in one round took `seconds`."""

    arm: str
    round: int
    calls: int
    seconds: float


def warm_up(call: Callable[[], object]) -> float:
    """Call until compilation, allocation and caches have settled; returns the seconds of the fastest call."""
    fastest, started, calls = math.inf, time.perf_counter(), 0
    while calls < WARMUP_CALLS or time.perf_counter() - started < WARMUP_SECONDS:
        before = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - before)
        calls += 1
    return fastest


def interleave(arms: Mapping[str, Callable[[], object]], rounds: int, round_seconds: float, seed: int) -> list[Round]:
    """Measure every arm once per round, each for at least about `round_seconds`, after warming up all arms."""
    calls = {name: max(1, math.ceil(round_seconds / warm_up(call))) for name, call in arms.items()}
    order = random.Random(seed)
    measured = []
    for number in range(rounds):
        for name in order.sample(list(arms), len(arms)):
            call, count = arms[name], calls[name]
            before = time.perf_counter()
            for _ in range(count):
                call()
            measured.append(Round(name, number, count, time.perf_counter() - before))
    return measured
