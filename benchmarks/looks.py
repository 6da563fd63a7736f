"""python -m benchmarks.looks run=RUN [simulations=N]: what planned looks save, from the deviations of an ablation.

Takes the means and deviations of the run's variants as the truth and simulates ablations from them: with
`search.seeds=auto`, and with the fixed number of seeds that settles as large a share of the claims. Prints how many
trials each takes. Expect a few minutes.
"""

import bisect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
from pydantic import Field

from benchmarks.simulation import judge_by_plan
from harness.config import BadInput, StageConfig, command_line
from harness.run.directory import RunDirectory
from harness.run.progress import Progress
from harness.run.records import Metrics, TrialRecord
from harness.stats.claims import Finding, judge_claims
from harness.stats.sequential import FIXED, SEEDS, looks_of
from tune_spaces import Claim

MOST_SEEDS = 60


@dataclass(frozen=True)
class Truth:
    """Mean and standard deviation of a variant's test accuracy and of its gap."""

    test: tuple[float, float]
    gap: tuple[float, float]

    @classmethod
    def of(cls, records: Sequence[TrialRecord]) -> "Truth":
        values = {name: [r.metrics.of(name) for r in records] for name in ("test_accuracy", "gap")}
        test, gap = ((float(np.mean(v)), float(np.std(v, ddof=1))) for v in values.values())
        return cls(test, gap)


def simulated(generator: np.random.Generator, truths: Mapping[str, Truth], seeds: int) -> list[TrialRecord]:
    records = []
    for name, truth in truths.items():
        draws = zip(
            generator.normal(*truth.test, seeds).tolist(), generator.normal(*truth.gap, seeds).tolist(), strict=True
        )
        for seed, (test, gap) in enumerate(draws):
            metrics = Metrics(test_accuracy=test, train_accuracy=test + gap)
            records.append(
                TrialRecord.model_construct(
                    variant=name, index=seed, seed=seed, status="finished", metrics=metrics, config={}
                )
            )
    return records


def settled_share(findings: Sequence[Finding]) -> float:
    return fmean(one.verdict != "not settled" for one in findings)


def trials_with_looks(findings: Sequence[Finding], variants: Sequence[str]) -> int:
    """Trials that the looks took: each variant until its last claim was settled."""
    ends = dict.fromkeys(variants, SEEDS[0])
    for one in findings:
        for name in (one.variant, one.than):
            ends[name] = max(ends[name], one.difference.n)
    return sum(ends.values())


def compare_designs(truths: Mapping[str, Truth], claims: Sequence[Claim], simulations: int) -> tuple[float, float, int]:
    """(share of claims that planned looks settle, median of their trials, trials of the fixed design as powerful)."""
    generator, auto = np.random.default_rng(0), looks_of("auto")
    found = [judge_by_plan(claims, simulated(generator, truths, SEEDS[-1]), auto) for _ in range(simulations)]
    share = fmean(map(settled_share, found))

    def share_with(seeds: int) -> float:
        draws = np.random.default_rng(seeds)
        return fmean(
            settled_share(judge_claims(claims, simulated(draws, truths, seeds), FIXED)) for _ in range(simulations)
        )

    numbers = range(2, MOST_SEEDS + 1)
    found_at = bisect.bisect_left(numbers, share, key=share_with)
    if found_at == len(numbers):
        raise BadInput(f"run: no fixed number up to {MOST_SEEDS} seeds settles as many claims")
    fixed = numbers[found_at]
    return share, median(trials_with_looks(one, list(truths)) for one in found), fixed * len(truths)


class Looks(StageConfig):
    simulations: int = Field(200, ge=10, description="simulated ablations of each design")


def main(config: Looks) -> int:
    run = RunDirectory.existing(Path(config.run))
    recorded, progress = run.recorded(), Progress()
    tested = [record for record in run.trials() if record.is_tested and record.variant]
    groups = {name: [r for r in tested if r.variant == name] for name in recorded.variants}
    claims = [Claim(**claim) for claim in recorded.claims]
    few = [name for name, own in groups.items() if len(own) < 2]
    if few or not claims:
        raise BadInput(
            f"run={config.run}: needs claims, and two tested seeds of each variant (fewer: {', '.join(few)})"
        )
    truths = {name: Truth.of(own) for name, own in groups.items()}
    share, planned, fixed = compare_designs(truths, claims, config.simulations)
    progress.line(
        f"search.seeds=auto settles {share:.2f} of {len(claims)} claims with {planned:g} trials (median of "
        f"{config.simulations} simulations); the fixed number of seeds that settles as many takes {fixed} trials, so "
        f"that auto takes {planned / fixed:.2f} of them"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_command(Looks, main, __doc__ or ""))
