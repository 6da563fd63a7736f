"""Intervals against known values; rankings that do not fall for luck."""

import math
import re

import numpy as np
import pytest
from conftest import TOP

from harness.run.records import Metrics, TrialRecord
from harness.stats.claims import holm, judge_claims, needed_seeds
from harness.stats.intervals import difference_interval, mean_interval, ratio_interval
from harness.stats.ranking import rank, winning_trial
from tune_spaces import Claim


def test_mean_interval():
    # mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776445
    estimate = mean_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (estimate.mean, estimate.n) == (3, 5)
    assert estimate.low == pytest.approx(3 - half, abs=1e-5)
    assert estimate.high == pytest.approx(3 + half, abs=1e-5)
    assert math.isnan(mean_interval([1.0]).low)


def test_ratio_interval_covers_a_constant_ratio():
    estimate = ratio_interval([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert estimate.mean == pytest.approx(2)
    assert estimate.low == pytest.approx(2)


def test_differences_are_paired_by_seed():
    reference = {0: 0.5, 1: 0.6, 2: 0.7}
    better = {0: 0.51, 1: 0.611, 2: 0.712}  # by 0.010, 0.011, 0.012: t(0.975, 2) = 4.302653
    paired = difference_interval(better, reference)
    assert paired.low == pytest.approx(0.011 - 4.302653 * 0.001 / math.sqrt(3))
    unpaired = difference_interval({seed + 10: value for seed, value in better.items()}, reference)
    assert unpaired.low < 0 < unpaired.high


def record(index, seed, accuracy, stage="search", status="finished", variant=""):
    return TrialRecord(
        id=f"{index}-{seed}",
        stage=stage,
        status=status,
        variant=variant,
        index=index,
        seed=seed,
        parameters={"x": index} if index else {},
        config={"x": index},
        metrics=Metrics(val_accuracy=accuracy, val_loss=1 - accuracy),
    )


def test_confirmed_runs_alone_decide():
    lucky = record(1, 1, 0.99)
    steady = record(2, 2, 0.90)
    confirmed = [
        record(i, s, a, "confirm") for i, s, a in ((1, 100, 0.70), (1, 101, 0.72), (2, 100, 0.88), (2, 101, 0.9))
    ]
    ranked = rank([lucky, steady, *confirmed])
    assert [one.name for one in ranked] == ["sample 2", "sample 1"]
    assert ranked[0].estimate.mean == pytest.approx(0.89)
    assert winning_trial(ranked[0]).seed == 101


def test_what_cannot_be_told_apart_is_a_tie():
    close = [
        record(i, s, a)
        for i, s, a in ((1, 0, 0.80), (1, 1, 0.82), (1, 2, 0.81), (2, 0, 0.81), (2, 1, 0.80), (2, 2, 0.82))
    ]
    far = [record(3, s, a) for s, a in ((0, 0.50), (1, 0.53), (2, 0.51))]
    ranked = rank(close + far)
    assert [one.tied for one in ranked] == [False, True, False]
    assert ranked[-1].name == "sample 3"


def test_unfinished_trials_cannot_win():
    ranked = rank([record(1, 0, 0.9, status="stopped"), record(2, 0, 0.8, status="diverged"), record(3, 0, 0.5)])
    assert [one.name for one in ranked] == ["sample 3"]
    assert rank([]) == []


def test_loss_is_ranked_upwards():
    ranked = rank([record(1, 0, 0.9), record(2, 0, 0.8)], "val_loss")
    assert ranked[0].name == "sample 1"


def test_two_equal_runs_do_not_make_certainty():
    ranked = rank([record(1, 0, 0.8), record(1, 1, 0.8), record(2, 0, 0.7), record(2, 1, 0.75)])
    assert ranked[0].estimate.mean == 0.8
    assert math.isnan(ranked[0].estimate.low)
    by_as_much = rank([record(1, 0, 0.8), record(1, 1, 0.7), record(2, 0, 0.75), record(2, 1, 0.65)])
    assert by_as_much[1].tied
    (found,) = judge_claims([Claim("b beats a", "b", "a")], [*seeds("a", [0.7] * 3), *seeds("b", [0.8] * 3)])
    assert found.verdict == "not settled"  # the variance of three times 0.7 is 1.8e-32
    assert math.isnan(found.difference.low)


def seeds(variant, values, gap=None):
    """Finished trials of a variant, a test accuracy each."""
    found = [record(0, seed, 0.5, variant=variant) for seed in range(len(values))]
    for seed, (one, value) in enumerate(zip(found, values, strict=True)):
        train_accuracy = float(value + (0 if gap is None else gap[seed]))
        one.metrics = Metrics(test_accuracy=float(value), train_accuracy=train_accuracy)
    return found


def test_holm():
    # 4 * 0.01, 3 * 0.02, 2 * 0.03 is less than that, 0.5
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([]) == []


SPREAD = np.array([-0.01, 0.0, 0.01])


def test_a_finding():
    """By hand: variances 1e-4 of two groups of three, so their difference has error 0.01 * sqrt(2/3), t(0.975, 4)."""
    records = [r for name, middle in (("a", 0.80), ("b", 0.83), ("c", 0.5)) for r in seeds(name, middle + SPREAD)]
    (found,) = judge_claims([Claim("b beats a", "b", "a")], records)
    half = 2.776445 * 0.01 * math.sqrt(2 / 3)
    assert found.difference.mean == pytest.approx(0.03)
    assert found.difference.high - found.difference.mean == pytest.approx(half, abs=1e-6)
    assert found.p == pytest.approx(0.0213, abs=2e-4)  # t = 3.674, twice the tail of 4 degrees of freedom
    assert found.verdict == "holds"
    assert (
        found.sentence == "b beats a: +3.0 [+0.7, +5.3] points over 3 seeds, holds (p = 0.021 after Holm's correction)"
    )
    (turned,) = judge_claims([Claim("a beats b", "a", "b")], records)
    assert turned.verdict == "does not hold"


def test_unlike_groups_are_those_of_scipy():
    from scipy import stats as scipy

    a, b = [0.70, 0.75, 0.73, 0.78, 0.71], [0.80, 0.803, 0.801]
    (found,) = judge_claims([Claim("", "b", "a")], [*seeds("a", a), *seeds("b", b)])
    test = scipy.ttest_ind(b, a, equal_var=False)
    assert found.p == pytest.approx(test.pvalue)
    interval = test.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    assert found.difference.n == 3


def test_a_noisy_variant_borrows_no_certainty():
    noisy = [*seeds("a", 0.5 + 20 * SPREAD), *seeds("b", 0.7 + SPREAD / 20), *seeds("c", 0.9 + SPREAD / 20)]
    found = judge_claims([Claim("", "c", "b"), Claim("", "a", "b")], noisy)
    assert [one.verdict for one in found] == ["holds", "not settled"]


def test_seeds_that_diverged_are_told():
    records = [*seeds("a", 0.80 + SPREAD), *seeds("b", 0.9 + SPREAD), record(0, 3, 0.1, status="diverged", variant="b")]
    (found,) = judge_claims([Claim("b beats a", "b", "a")], records)
    assert "over 3 seeds (1 diverged and left out), holds" in found.sentence


def test_equivalence_is_shown_not_assumed():
    claim = Claim("as good", "b", "a", margin=0.005)
    same = [*seeds("a", 0.8 + SPREAD / 20), *seeds("b", 0.8001 + SPREAD / 20)]
    noisy = [*seeds("a", 0.8 + SPREAD), *seeds("b", 0.8001 + SPREAD)]
    other = [*seeds("a", 0.8 + SPREAD / 20), *seeds("b", 0.83 + SPREAD / 20)]
    assert [judge_claims([claim], r)[0].verdict for r in (same, noisy, other)] == [
        "holds",
        "not settled",
        "does not hold",
    ]


def test_unlike_within_no_margin_is_the_test_of_a_difference():
    """Where the margin is nothing against the error, a difference on either side speaks against the claim."""
    from scipy import stats as scipy

    a, b = [0.70, 0.75, 0.73, 0.78, 0.71], [0.80, 0.803, 0.801]
    (found,) = judge_claims([Claim("as good", "b", "a", margin=1e-9)], [*seeds("a", a), *seeds("b", b)])
    assert found.verdict == "does not hold"
    assert found.p == pytest.approx(scipy.ttest_ind(b, a, equal_var=False).pvalue)


def test_less_of_a_gap_is_better():
    records = [*seeds("plain", 0.8 + SPREAD, 0.15 + SPREAD), *seeds("decay", 0.8 + SPREAD, 0.05 + SPREAD)]
    (found,) = judge_claims([Claim("decay overfits less", "decay", "plain", "gap")], records)
    assert found.difference.mean == pytest.approx(-0.1)
    assert found.verdict == "holds"
    assert "points of training minus test accuracy" in found.sentence


def test_what_has_one_seed_or_none_is_not_settled():
    claims = [Claim("b beats a", "b", "a"), Claim("c beats a", "c", "a")]
    (found,) = judge_claims(claims, [*seeds("a", [0.8]), *seeds("b", [0.9])])
    assert (found.verdict, found.seeds) == ("not settled", None)
    assert "nan" not in found.sentence


@pytest.mark.parametrize(("deviation", "seeds"), [(0.003, 7), (0.001, 3), (0.0, None), (1.0, None)])
def test_seeds_that_would_settle(deviation, seeds):
    """That these do is simulated in test_as_many_seeds_as_are_told_settle_it."""
    assert needed_seeds(deviation, 0.005, 1) == seeds


# The published report's table: twelve variants, seven claims; runs of one variant differ by 0.4 points or so.
VARIANTS = [*"abcdefghijkl"]
CLAIMS = [Claim("", *pair) for pair in ("ab", "ac", "ad", "ae", "fa", "gh", "hi")]
NULL = [*CLAIMS[:6], Claim("", "h", "i", margin=0.005)]


def share_of(claims, deviations, means, n, wanted, runs=1000):
    """Of simulated ablations in which any of the claims gets a verdict of `wanted(claim, finding)`."""
    generator, hits = np.random.default_rng(0), 0
    for _ in range(runs):
        records = [
            r
            for name, deviation in zip(VARIANTS, deviations, strict=True)
            for r in seeds(name, generator.normal(means.get(name, 0.75), deviation, n))
        ]
        hits += any(wanted(one) for one in judge_claims(claims, records))
    return hits / runs


@pytest.mark.parametrize("n", [pytest.param(3, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize(
    "deviations",
    [[0.004] * 12, np.linspace(0.002, 0.006, 12), np.linspace(0.006, 0.002, 12), [0.012, *[0.004] * 11]],
    ids=["equal", "rising", "falling", "one noisy"],
)
def test_true_nulls_are_rarely_called_real(n, deviations):
    """All comparisons of one table together, in 1,000 ablations; the claim of equivalence is false by its margin.

    The claims are about the first nine variants: with falling deviations about those that differ most.
    """
    share = share_of(NULL, deviations, {"i": 0.755}, n, lambda one: one.verdict != "not settled")
    assert share <= 0.05


def found_a_beats_b(one):
    return (one.variant, one.than, one.verdict) == ("a", "b", "holds")


def test_power():
    """A point more at five seeds: the share of ablations that call it so is what docs/published.md says."""
    page = " ".join((TOP / "docs" / "published.md").read_text().split())
    stated = re.search(r"a deviation of 0\.4 points and five seeds with (\d+) %", page)
    assert stated
    share = share_of(CLAIMS, [0.004] * 12, {"b": 0.74}, 5, found_a_beats_b)
    assert share == pytest.approx(int(stated[1]) / 100, abs=0.03)


@pytest.mark.parametrize("equivalence", [False, True])
def test_as_many_seeds_as_are_told_settle_it(equivalence):
    """With 80 % power, and two seeds less with less; `equivalence`: of two that are as good."""
    needed = needed_seeds(0.004, 0.01, 7, equivalence=equivalence)
    claims = [Claim("", "a", "b", margin=0.01) if equivalence else CLAIMS[0], *CLAIMS[1:]]
    means = {} if equivalence else {"b": 0.74}
    enough, fewer = (share_of(claims, [0.004] * 12, means, n, found_a_beats_b) for n in (needed, needed - 2))
    assert 0.77 < enough < 0.9
    assert fewer < 0.77
