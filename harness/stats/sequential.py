"""Looks: the numbers of seeds or replicates at which results are judged, fixed beforehand, and what each may spend.

Looking after every added seed until something is settled would call a true null real ever more often (in 0.28 of
tables of 7 claims by 30 seeds). So `auto` looks at fixed numbers, and divides the error probability of 0.05 among them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.stats.intervals import CONFIDENCE

SEEDS = (3, 5, 8, 13, 20)
REPLICATES = (5, 8, 13, 20)


@dataclass(frozen=True)
class Look:
    """A look at the first `number` seeds or replicates (None: all there are), which may spend `alpha`."""

    number: int | None
    alpha: float


FIXED = (Look(None, 1 - CONFIDENCE),)


def is_planned(alphas: Iterable[float]) -> bool:
    """Whether looks that spent these error probabilities were of a plan."""
    return any(alpha < 1 - CONFIDENCE for alpha in alphas)


def looks_of(number: int | Literal["auto"], automatic: Sequence[int] = SEEDS) -> tuple[Look, ...]:
    """The looks of `search.seeds` or `benchmark.replicates`. With auto, each of the `automatic` ones spends an equal
    part of 0.05, so that all together err in at most 5 % (Bonferroni)."""
    return tuple(Look(n, (1 - CONFIDENCE) / len(automatic)) for n in automatic) if number == "auto" else FIXED
