"""What a run has so far, as report, command line and Python say it; from the run directory alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from harness.reporting.headline import Headline, correct_images, headline
from harness.reporting.tables import VariantRow
from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest
from harness.run.recommendation import Recommendation
from harness.run.records import RunRecord, TrialRecord
from harness.stats.claims import Finding, judge_claims
from harness.stats.ranking import Ranked, rank, winning_trial
from harness.stats.sequential import is_planned, looks_of
from tune_spaces import Claim


@dataclass(frozen=True)
class Results:
    """What a run has so far: trials, ranking and winner, the winner's export and recommendation, findings."""

    run: RunDirectory
    recorded: RunRecord
    records: list[TrialRecord]
    ranked: list[Ranked]
    winner: TrialRecord | None
    manifest: Manifest | None
    recommended: Recommendation | None
    findings: list[Finding]

    @classmethod
    def of(cls, run: RunDirectory) -> "Results":
        recorded, records = run.recorded(), run.trials()
        ranked = rank(records, recorded.metric)
        winner = winning_trial(ranked[0], recorded.metric) if ranked else None
        recommended, manifest = _recommendation(run, winner), None
        try:
            manifest = winners_manifest(run, winner)
        except storage.Corrupt as error:
            run.notice(f"{error}; the export is left out")
        return cls(run, recorded, records, ranked, winner, manifest, recommended, findings_of(recorded, records))

    @property
    def headline(self) -> Headline:
        return headline(
            self.run, self.recorded, self.ranked, self.manifest, self.recommended, self.findings, self.records
        )


def winners_manifest(run: RunDirectory, winner: TrialRecord | None) -> Manifest | None:
    """The manifest of the winner's export, if it is exported."""
    file = run.exported_folder(winner.id) / "manifest.json" if winner else None
    return Manifest.read(file) if file and file.is_file() else None


def _recommendation(run: RunDirectory, winner: TrialRecord | None) -> Recommendation | None:
    """The benchmark's recommendation, if it measured the winner."""
    if winner is None or not run.is_benchmark_intact("verdict.json"):
        return None
    found = Recommendation.read(run.path / "verdict.json")
    return found if found.id == winner.id else None


def claims_of(recorded: RunRecord) -> list[Claim]:
    """The claims of the run's space."""
    return [Claim(**claim) for claim in recorded.claims]


def findings_of(recorded: RunRecord, records: Sequence[TrialRecord]) -> list[Finding]:
    """The findings about the claims of an ablation."""
    planned = is_planned(look.alpha for look in recorded.looks)  # whatever the last command asked for
    looks = looks_of("auto" if planned else _seeds(recorded))
    if is_short(recorded, records):
        looks = (replace(looks[0], alpha=0.0),)
    return judge_claims(claims_of(recorded), records, looks)


def is_short(recorded: RunRecord, records: Sequence[TrialRecord]) -> bool:
    """Whether the last command was to train more seeds, a fixed number, than a variant has."""
    seeds = _seeds(recorded)
    if seeds == "auto":
        return False
    ended = Counter(r.variant for r in records if r.is_done or r.is_failure)
    return any(0 < ended[name] < seeds for name in recorded.config["search"].get("variants") or recorded.variants)


def _seeds(recorded: RunRecord) -> int | Literal["auto"]:
    seeds: int | Literal["auto"] = recorded.config["search"].get("seeds", 3)
    return seeds


def variants_of(
    recorded: RunRecord, records: Sequence[TrialRecord], run: RunDirectory | None = None
) -> list[VariantRow]:
    """The variants of an ablation that have tested trials, in the space's order; `run` has their correct images."""
    rows = []
    for name in recorded.variants:
        if group := [r for r in records if r.variant == name and r.is_tested]:
            correct = correct_images(run, group, recorded.data.test) if run else None
            rows.append(VariantRow.of(name, group, recorded.published.get(name), correct))
    return rows
