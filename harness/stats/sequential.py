"""Looks: the numbers of seeds or replicates at which results are judged, fixed beforehand, and what each may spend.

Looking after every added seed until something is settled would call a true null real ever more often (in 0.28 of
tables of 7 claims by 30 seeds). So `auto` looks at fixed numbers, and divides the error probability of 0.05 among them.
"""

from dataclasses import dataclass
from typing import Literal

from harness.stats.intervals import CONFIDENCE

SEEDS = (3, 5, 8, 13, 20)
REPLICATES = (5, 8, 13, 20)


@dataclass(frozen=True)
class Look:
    """A look at the first `seeds` seeds of each variant (None: all), which may spend `alpha`."""

    seeds: int | None
    alpha: float


FIXED = (Look(None, 1 - CONFIDENCE),)


def looks_of(seeds: int | Literal["auto"]) -> tuple[Look, ...]:
    """The looks of `search.seeds`: with auto each spends an equal part of 0.05, so that all err in at most 5 %."""
    return tuple(Look(number, (1 - CONFIDENCE) / len(SEEDS)) for number in SEEDS) if seeds == "auto" else FIXED
