"""Spaces as plain data: `tune_spaces/<name>.py` has `SPACE = Space(...)`; `space=<name>` selects it.

There are two kinds of space:

- an ablation: `variants` names changes to one base; each variant is trained with several seeds;
- a search: `parameters` gives distributions; sample 0 is the base itself, sample i is always the same draw.

A space with neither is one configuration. Keys are those of the command line; the leading `trial.` may be left out:
`optimizer.lr`, `options.kernel_size`, `epochs`. This package does not depend on how trials are run.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

LONGEST_NAME = 200  # characters of a variant's name


@dataclass(frozen=True)
class Uniform:
    """A float drawn uniformly between `low` and `high`. Raises ValueError where low >= high."""

    low: float
    high: float

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"Uniform({self.low}, {self.high}): low must be less than high, both finite")

    def draw(self, generator: random.Random) -> float:
        return generator.uniform(self.low, self.high)


@dataclass(frozen=True)
class LogUniform:
    """A positive float whose logarithm is drawn uniformly. Raises ValueError unless 0 < low < high."""

    low: float
    high: float

    def __post_init__(self):
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"LogUniform({self.low}, {self.high}): needs 0 < low < high, finite")

    def draw(self, generator: random.Random) -> float:
        return math.exp(generator.uniform(math.log(self.low), math.log(self.high)))


@dataclass(frozen=True)
class Integer:
    """An integer from `low` to `high`, both included. Raises ValueError where low > high."""

    low: int
    high: int

    def __post_init__(self):
        if not (isinstance(self.low, int) and isinstance(self.high, int)):
            raise ValueError(f"Integer({self.low}, {self.high}): give integers")
        if not self.low <= self.high:
            raise ValueError(f"Integer({self.low}, {self.high}): low must not be more than high")

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(range(self.low, self.high + 1))

    def draw(self, generator: random.Random) -> int:
        return generator.randint(self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of `values`, all equally likely. Raises ValueError where there are none."""

    values: Sequence[Any]

    def __post_init__(self):
        if isinstance(self.values, str) or not isinstance(self.values, Sequence):
            raise ValueError(f"Choice({self.values!r}): give a list of values")
        if not self.values:
            raise ValueError("Choice([]): give at least one value")
        for value in self.values:
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"Choice: {value!r:.60}: give finite numbers, text, or lists of these") from error
        # As in the records of trials, with which Optuna compares them.
        object.__setattr__(self, "values", [_without_tuples(value) for value in self.values])

    def draw(self, generator: random.Random) -> Any:
        return generator.choice(self.values)


@dataclass(frozen=True)
class Claim:
    """A claim that `variant` is better than `than`, which the report tests; `says` is the claim in words.

    `metric`: test_accuracy, or gap (training minus test accuracy, a measure of overfitting; less is better). Training
    accuracy is over the steps since the previous validation, so compare only trials that keep the weights of the same
    epoch. `margin`: claims instead that the two differ by less than this fraction. `of_interest`: the smallest
    difference that matters, a fraction; the claim is also settled where there is none as large. Default: 0.5 points of
    accuracy, 2 points of gap. Raises ValueError where a value is invalid.
    """

    says: str
    variant: str
    than: str
    metric: Literal["test_accuracy", "gap"] = "test_accuracy"
    margin: float | None = None
    of_interest: float | None = None

    def __post_init__(self):
        if self.metric not in ("test_accuracy", "gap"):
            raise ValueError(f"claim {self.says!r}: metric={self.metric} is not known; choose test_accuracy or gap")
        for name in ("margin", "of_interest"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"claim {self.says!r}: {name}={value} must be a fraction above 0")
        if self.variant == self.than:
            raise ValueError(f"claim {self.says!r}: compares {self.variant} with itself")

    @property
    def higher(self) -> bool:
        """Whether a higher metric is better."""
        return self.metric != "gap"

    @property
    def smallest(self) -> float:
        """The margin, or the smallest difference of interest."""
        return self.margin or self.of_interest or (0.02 if self.metric == "gap" else 0.005)


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(one) for key, one in value.items()}
    return [_without_tuples(one) for one in value] if isinstance(value, list | tuple) else value


def _without_prefix(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the leading `trial.` of keys, which spaces may write as on the command line."""
    return {key.removeprefix("trial."): value for key, value in changes.items()}


Domain = Uniform | LogUniform | Integer | Choice


@dataclass(frozen=True)
class Space:
    """A base configuration and what is tried around it.

    `trial`, `data`, `search`: values that differ from the harness's defaults, by dotted key. `parameters`: what a
    search draws, by key of `trial`. `variants`: named changes to `trial`. `claims`: comparisons of variants; without
    claims, each variant is compared with the first. `published`: published test accuracies of variants, as fractions.
    Raises ValueError where a variant is unknown, or where there are both parameters and variants.
    """

    trial: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Domain] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    published: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("trial", "parameters"):
            object.__setattr__(self, name, _without_prefix(getattr(self, name)))
        object.__setattr__(self, "variants", {name: _without_prefix(one) for name, one in self.variants.items()})
        for name in self.variants:
            if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
                raise ValueError(f"variants: {name!r:.60}: give names of 1 to {LONGEST_NAME} printable characters")
        for key, domain in self.parameters.items():
            if not isinstance(domain, Uniform | LogUniform | Integer | Choice):
                raise ValueError(f"parameters {key}={domain!r:.60}: give a Uniform, LogUniform, Integer or Choice")
        named = {*self.published, *(name for claim in self.claims for name in (claim.variant, claim.than))}
        if unknown := sorted(named - set(self.variants)):
            raise ValueError(f"claims and published name {', '.join(unknown)}, which the space has no variant of")
        if self.parameters and self.variants:
            raise ValueError("a space has either parameters (a search) or variants (an ablation), not both")
