"""What to try, as plain data: `tune_spaces/<name>.py` has `SPACE = Space(...)`; the file name is `space=<name>`.

Two kinds of space share this vocabulary:

- an ablation: `variants` names changes to one base; each variant is trained with several seeds;
- a search: `parameters` gives distributions; sample 0 is the base itself, sample i is always the same draw.

A space with neither is one configuration. Keys are those of the command line without the leading `trial.`:
`optimizer.lr`, `options.kernel_size`, `epochs`. Nothing here knows how trials are run.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Uniform:
    """A float drawn evenly between `low` and `high`."""

    low: float
    high: float

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"Uniform({self.low}, {self.high}): low must be less than high")

    def draw(self, generator: random.Random) -> float:
        return generator.uniform(self.low, self.high)


@dataclass(frozen=True)
class LogUniform:
    """A positive float whose logarithm is drawn evenly between those of `low` and `high`."""

    low: float
    high: float

    def __post_init__(self):
        if not 0 < self.low < self.high:
            raise ValueError(f"LogUniform({self.low}, {self.high}): needs 0 < low < high")

    def draw(self, generator: random.Random) -> float:
        return math.exp(generator.uniform(math.log(self.low), math.log(self.high)))


@dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self):
        if not self.low <= self.high:
            raise ValueError(f"Integer({self.low}, {self.high}): low must not be more than high")

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(range(self.low, self.high + 1))

    def draw(self, generator: random.Random) -> int:
        return generator.randint(self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of `values`, each as likely."""

    values: Sequence[Any]

    def __post_init__(self):
        if not self.values:
            raise ValueError("Choice([]): give at least one value")

    def draw(self, generator: random.Random) -> Any:
        return generator.choice(self.values)


@dataclass(frozen=True)
class Claim:
    """That one variant is better than another, for the report to judge: `says` is the claim in words.

    `metric`: test_accuracy, or gap (training minus test accuracy: how much the network overfits), of which less is
    better; the training accuracy is that of the steps since the validation before, so it compares trials that keep the
    weights of the same epoch. `margin`: the claim is that the two are as good, to within so much (a fraction) either
    way.
    """

    says: str
    variant: str
    than: str
    metric: Literal["test_accuracy", "gap"] = "test_accuracy"
    margin: float | None = None

    def __post_init__(self):
        if self.metric not in ("test_accuracy", "gap"):
            raise ValueError(f"claim {self.says!r}: metric={self.metric} is not known; choose test_accuracy or gap")
        if self.margin is not None and not 0 < self.margin < 1:
            raise ValueError(f"claim {self.says!r}: margin={self.margin} must be a fraction above 0")
        if self.variant == self.than:
            raise ValueError(f"claim {self.says!r}: compares {self.variant} with itself")

    @property
    def higher(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric != "gap"


Domain = Uniform | LogUniform | Integer | Choice


@dataclass(frozen=True)
class Space:
    """A base configuration and what is tried around it.

    `trial`, `data`, `search`: values that differ from the harness's defaults, by dotted key. `parameters`: what a
    search draws, by key of `trial`. `variants`: named changes to `trial`. `claims`: which of them are compared; without
    any, each with the first. `published`: test accuracies that others report for variants, as fractions.
    """

    trial: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Domain] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    published: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        named = {*self.published, *(name for claim in self.claims for name in (claim.variant, claim.than))}
        if unknown := sorted(named - set(self.variants)):
            raise ValueError(f"claims and published name {', '.join(unknown)}, which is none of the variants")
        if self.parameters and self.variants:
            raise ValueError("a space has either parameters (a search) or variants (an ablation), not both")
