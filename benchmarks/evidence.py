"""python -m benchmarks.evidence [simulations=N] [out=FILE.csv]: error rates of the report's sentences, by simulation.

Each scenario draws results whose truth is known, judges them by the functions that a run uses, and counts how often the
sentence is wrong (or, for power, right). Writes one row per scenario: rate, its 95 % interval, the limit that it must
keep. Takes about an hour for 2,000 simulations on one CPU core; docs/evidence.md has the results.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from benchmarks.inference.verdict import not_slower
from benchmarks.simulation import judge_by_plan
from harness.config import command_line
from harness.config.trial import Strict
from harness.run import storage
from harness.run.progress import Progress
from harness.run.records import Metrics, TrialRecord
from harness.run.tables import csv_text
from harness.stats.claims import Finding, judge_claims
from harness.stats.comparison import Comparison
from harness.stats.intervals import CONFIDENCE
from harness.stats.sequential import FIXED, SEEDS, Look, looks_of
from tune_spaces import Claim

Draw = Callable[[np.random.Generator], bool]


@dataclass(frozen=True)
class Scenario:
    """`happens`: whether the sentence is made in one simulation. Its rate must be at most `limit`, or at least if it is
    `power`."""

    sentence: str
    given: str
    happens: Draw
    limit: float
    power: bool = False

    @property
    def name(self) -> str:
        return f"{self.sentence}: {self.given}"


@dataclass(frozen=True)
class Rate:
    """How often a scenario's sentence was made; `low`, `high`: its exact 95 % binomial interval."""

    scenario: Scenario
    hits: int
    simulations: int

    @property
    def interval(self) -> tuple[float, float]:
        from scipy.stats import binomtest

        low, high = binomtest(self.hits, self.simulations).proportion_ci(CONFIDENCE)
        return float(low), float(high)

    @property
    def keeps_limit(self) -> bool:
        """Whether the interval does not contradict the limit."""
        low, high = self.interval
        return high >= self.scenario.limit if self.scenario.power else low <= self.scenario.limit


def measure_rate(scenario: Scenario, simulations: int) -> Rate:
    generator = np.random.default_rng(0)
    return Rate(scenario, sum(scenario.happens(generator) for _ in range(simulations)), simulations)


def scenarios() -> Iterator[Scenario]:
    for part in PARTS.values():
        yield from part()


def _compared(y: np.ndarray, *, paired: bool = False) -> tuple[Comparison, list[str]]:
    """The comparison of values [treatments, blocks], and the treatments by their means."""
    values = {str(i): dict(enumerate(row.tolist())) for i, row in enumerate(y)}
    compared = Comparison.of(values, paired=paired)
    return compared, sorted(values, key=lambda name: -compared.means[name])


def fewer_than(count: int) -> Callable[[list[str]], bool]:
    return lambda names: len(names) < count


def ranking_scenarios() -> Iterator[Scenario]:
    """Configurations as `rank` compares them (harness/stats/ranking.py)."""

    def draw(deviations: Sequence[float], seeds: int, lead: float, wanted: Callable[[list[str]], bool]) -> Draw:
        def happens(generator: np.random.Generator) -> bool:
            y = generator.normal(0, 1, (len(deviations), seeds)) * np.array(deviations)[:, None]
            y[0] += lead
            compared, names = _compared(y)
            return wanted(not_slower(compared, names, 1 - CONFIDENCE))

        return happens

    for k in (2, 3, 5, 8, 12):
        for seeds in (3, 4, 5):
            given, some_worse = f"{k} equal configurations, {seeds} seeds", draw([1] * k, seeds, 0, fewer_than(k))
            yield Scenario("one is worse than the best", given, some_worse, 0.05)
    for ratio, of in ((math.sqrt(3), "variances"), (3, "deviations")):
        for k in (2, 3, 5, 12):
            given = f"{k} equally good configurations, 3 seeds, {of} 1:3, one noisy"
            deviations = [ratio, *[1.0] * (k - 1)]
            yield Scenario("sole winner", given, draw(deviations, 3, 0, lambda e: len(e) == 1), 0.05)
    yield Scenario(
        "sole winner, rightly",
        "best of 3 leads by 3 deviations, 3 seeds",
        draw([1] * 3, 3, 3, lambda e: e == ["0"]),
        0.6,
        True,
    )


VARIANTS = [*"abcdefghijkl"]
CLAIMS = [Claim("", *pair) for pair in ("ab", "ac", "ad", "ae", "fa", "gh", "hi")]
DEVIATIONS = {
    "alike": [0.004] * 12,
    "falling from 3 to 1": np.linspace(0.006, 0.002, 12).tolist(),
    "one three times as large": [0.012, *[0.004] * 11],
}


def simulated_findings(
    generator: np.random.Generator,
    claims: Sequence[Claim],
    deviations: Sequence[float],
    means: Mapping[str, float],
    seeds: int,
    looks: Sequence[Look] = FIXED,
) -> list[Finding]:
    """Findings of an ablation of twelve variants with mean accuracy 0.75 unless `means` has another."""
    records = [
        TrialRecord.model_construct(
            variant=name, index=seed, seed=seed, status="finished", metrics=Metrics(test_accuracy=value), config={}
        )
        for name, deviation in zip(VARIANTS, deviations, strict=True)
        for seed, value in enumerate(generator.normal(means.get(name, 0.75), deviation, seeds).tolist())
    ]
    return judge_claims(claims, records) if looks == FIXED else judge_by_plan(claims, records, looks)


def claim_scenarios() -> Iterator[Scenario]:
    """Tables of seven claims, as the published report's."""

    def draw(
        claims: Sequence[Claim],
        deviations: Sequence[float],
        means: Mapping[str, float],
        seeds: int,
        wrong: Callable[[Finding], bool],
        looks: Sequence[Look] = FIXED,
    ) -> Draw:
        return lambda generator: any(
            wrong(one) for one in simulated_findings(generator, claims, deviations, means, seeds, looks)
        )

    auto, margin = looks_of("auto"), 0.005
    apart = {name: 0.75 + margin * i for i, name in enumerate("hgi")} | {"a": 0.75 + margin, "f": 0.75}
    equal = [Claim(c.says, c.variant, c.than, margin=margin) for c in CLAIMS]
    wrong = {
        "a difference is real": (CLAIMS, {}, ("holds", "does not hold"), "no difference"),
        "equivalent": (equal, apart, ("holds",), "differences of the margin or more"),
        "no difference of interest": (CLAIMS, apart, ("no difference",), "differences of interest"),
    }
    for name, deviations in DEVIATIONS.items():
        for seeds, looks, how in ((3, FIXED, "3 seeds"), (5, FIXED, "5 seeds"), (SEEDS[-1], auto, "seeds=auto")):
            for sentence, (claims, means, verdicts, truth) in wrong.items():
                given = f"7 claims, {how}, deviations {name}, {truth}"
                happens = draw(claims, deviations, means, seeds, is_any_of(verdicts), looks)
                yield Scenario(sentence, given, happens, 0.05)


def is_any_of(verdicts: Sequence[str]) -> Callable[[Finding], bool]:
    return lambda finding: finding.verdict in verdicts


def inference_scenarios() -> Iterator[Scenario]:
    """Arms at five replicates; the noise of the machine, which all arms of a replicate share, is ten percent."""

    def draw(noise: Sequence[float], faster: float, wanted: Callable[[list[str], Comparison], bool]) -> Draw:
        def happens(generator: np.random.Generator) -> bool:
            y = generator.normal(0, 1, (len(noise), 5)) * np.array(noise)[:, None] + generator.normal(0, 0.1, 5)
            y[-1] += math.log(faster)
            compared, names = _compared(y, paired=True)
            return wanted(not_slower(compared, names, 1 - CONFIDENCE), compared)

        return happens

    def misses(equal: list[str], compared: Comparison) -> bool:
        """Whether the interval of the ratio of the fastest arm to the first one misses 1, the truth."""
        if equal[0] == "0":
            return False
        interval = compared.difference(equal[0], "0").interval_at(1 - (1 - CONFIDENCE) / (len(compared.values) - 1))
        return not interval.low <= 0 <= interval.high

    for k in (2, 3, 5, 14):
        for noise in (0.03, 0.1):
            yield Scenario(
                "sole fastest",
                f"{k} equal arms, noise {noise:.0%}",
                draw([noise] * k, 1, lambda e, _: len(e) == 1),
                0.05,
            )
        yield Scenario(
            "sole fastest",
            f"{k} equal arms, noise 3%, one of 10%",
            draw([0.1, *[0.03] * (k - 1)], 1, lambda e, _: len(e) == 1),
            0.05,
        )
        yield Scenario(
            "interval of the chosen arm misses its ratio",
            f"{k} equal arms, noise 3%",
            draw([0.03] * k, 1, misses),
            0.07,
        )
    yield Scenario(
        "sole fastest, rightly",
        "one of 13 arms is 10% faster, noise 3%",
        draw([0.03] * 13, 1.1, lambda e, _: e == ["12"]),
        0.7,
        True,
    )


PARTS = {"ranking": ranking_scenarios, "claims": claim_scenarios, "inference": inference_scenarios}


class Evidence(Strict):
    simulations: int = Field(2000, ge=10, description="simulations of each scenario")
    part: Literal["ranking", "claims", "inference"] | None = Field(None, description="simulate this part alone")
    out: Path = Field(Path("rates.csv"), description="CSV file, one row per scenario")


def main(config: Evidence) -> int:
    progress, rows = Progress(), []
    for scenario in PARTS[config.part]() if config.part else scenarios():
        rate = measure_rate(scenario, config.simulations)
        low, high = rate.interval
        rows.append(
            {"sentence": scenario.sentence, "given": scenario.given, "rate": rate.hits / rate.simulations}
            | {"low": low, "high": high, "simulations": rate.simulations, "limit": scenario.limit}
            | {"kind": "power" if scenario.power else "error"}
        )
        storage.write_atomically(config.out, csv_text(rows[0], rows))
        progress.line(f"{scenario.name}: {rate.hits / rate.simulations:.3f} [{low:.3f}, {high:.3f}]")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_command(Evidence, main, __doc__ or ""))
