"""Accuracy on test images: of one network, and whether another network is at most so much less accurate (the gate).

Both networks classify the same images. Those that only one classifies correctly carry all that is known about the
difference: `lost` ones only the reference, `gained` ones only the other. The interval is Tango's score interval for
paired proportions (Statistics in Medicine 17, 1998), which also has a width where no image is lost or gained.
"""

import math
from dataclasses import dataclass
from typing import Literal

from harness.stats.intervals import CONFIDENCE, Estimate

Outcome = Literal["passes", "fails", "too few images"]
MOST = 10_000_000  # images; more are not asked for


def accuracy_interval(accuracy: float, images: float) -> Estimate:
    """Accuracy with Wilson's 95 % interval for the choice of test images (Journal of the American Statistical
    Association 22, 1927); `images`: effective number, need not be whole."""
    z = z_limit()
    middle = (accuracy + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(accuracy * (1 - accuracy) / images + z * z / (4 * images * images))
    return Estimate(accuracy, max(0.0, middle - half), min(1.0, middle + half), round(images))


def z_limit() -> float:
    """1.96: the normal quantile of two-sided 95 %."""
    from scipy.special import ndtri

    return float(ndtri(0.5 + CONFIDENCE / 2))


def score(lost: float, gained: float, images: float, change: float) -> float:
    """Tango's statistic of the hypothesis that accuracy changed by `change`: standard normal if it did.

    Increases with `gained`, decreases with `lost` and with `change`.
    """
    b = -gained - lost + (2 * images - gained + lost) * change
    c = -lost * change * (1 - change)
    q = (math.sqrt(max(0.0, b * b - 8 * images * c)) - b) / (4 * images)  # the constrained estimate of lost / images
    variance = images * (2 * q + change * (1 - change))
    distance = gained - lost - images * change
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance) if distance else 0.0


def change_interval(lost: int, gained: int, images: int) -> Estimate:
    """Change in accuracy with Tango's 95 % interval."""
    from scipy.optimize import brentq

    mean, z = (gained - lost) / images, z_limit()
    low = brentq(lambda change: score(lost, gained, images, change) - z, -1, mean) if lost < images else -1.0
    high = brentq(lambda change: score(lost, gained, images, change) + z, mean, 1) if gained < images else 1.0
    return Estimate(mean, float(low), float(high), images)


@dataclass(frozen=True)
class Gate:
    """Whether accuracy fell by at most `allowed` (a fraction): `passes` or `fails` only if the interval says so.

    `needed`: images with which the same shares of lost and gained would pass; None where they would not, however many,
    or where that is not asked.
    """

    change: Estimate
    allowed: float
    outcome: Outcome
    needed: int | None

    @classmethod
    def of(cls, lost: int, gained: int, images: int, allowed: float) -> "Gate":
        z = z_limit()
        statistic = score(lost, gained, images, -allowed)
        outcome: Outcome = "passes" if statistic >= z else "fails" if statistic <= -z else "too few images"
        needed = needed_images(lost, gained, images, allowed) if outcome == "too few images" else None
        return cls(change_interval(lost, gained, images), allowed, outcome, needed)

    def __str__(self) -> str:
        """The outcome in words, in points (percent)."""
        mean, low, high = (100 * v for v in (self.change.mean, self.change.low, self.change.high))
        text = f"accuracy {mean:+.2f} [{low:+.2f}, {high:+.2f}] points on {self.change.n:,} test images"
        return f"{text}; {self.reservation}" if self.reservation else text

    @property
    def reservation(self) -> str:
        """What is not shown; empty if it passes."""
        limit = f"{100 * self.allowed:g} points"
        if self.outcome == "passes":
            return ""
        if self.outcome == "fails":
            return f"a drop of more than {limit}, which is more than is allowed"
        more = f"about {self.needed:,} would do" if self.needed else "more images like these would not show it either"
        return f"too few images to exclude a drop of more than {limit} ({more})"


def needed_images(lost: int, gained: int, images: int, allowed: float) -> int | None:
    """The images with which the shares of lost and gained would pass; None if more than MOST."""
    z = z_limit()

    def passes(n: float) -> bool:
        return score(lost * n / images, gained * n / images, n, -allowed) >= z

    if allowed <= 0 or not passes(MOST):
        return None
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def can_pass(images: int, allowed: float) -> bool:
    """Whether so many images can show that accuracy fell by at most `allowed`, if none is lost or gained."""
    return score(0, 0, images, -allowed) >= z_limit()
