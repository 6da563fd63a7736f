"""What search.seeds=auto would do with simulated trials."""

from collections.abc import Sequence

from harness.run.records import TrialRecord
from harness.stats.claims import Finding, judge_claims
from harness.stats.sequential import Look
from tune_spaces import Claim


def judge_by_plan(claims: Sequence[Claim], records: Sequence[TrialRecord], looks: Sequence[Look]) -> list[Finding]:
    """The findings of seeds=auto, which trains only the variants of open claims on; `records`: what it may train."""
    variants, trained, findings = {r.variant for r in records}, list[TrialRecord](), list[Finding]()
    for number, look in enumerate(looks):
        before = looks[number - 1].number or 0 if number else 0
        trained += [r for r in records if r.variant in variants and before <= r.index < (look.number or 0)]
        findings = judge_claims(claims, trained, looks[: number + 1])
        variants = {name for one in findings if one.is_open for name in (one.variant, one.than)}
        if not variants:
            break
    return findings
