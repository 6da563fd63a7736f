"""Intervals against known values, the comparison model, and rankings that do not fall for luck."""

import math

import numpy as np
import pytest
from conftest import trial_record
from scipy import stats as scipy

from harness.stats.comparison import Comparison
from harness.stats.intervals import GUARD, mean_interval, ratio_interval
from harness.stats.ranking import rank, winning_trial
from harness.stats.shares import share_interval


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


def of(*groups, paired=False):
    return Comparison.of({str(i): dict(enumerate(group)) for i, group in enumerate(groups)}, paired=paired)


def test_two_groups_are_welchs_case():
    a, b = [0.70, 0.75, 0.73, 0.78, 0.71], [0.80, 0.803, 0.801]
    found, test = of(b, a).difference("0", "1"), scipy.ttest_ind(b, a, equal_var=False)
    interval, expected = found.interval_at(0.95), test.confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert 2 * found.above(abs(found.mean)) == pytest.approx(test.pvalue)


def test_two_groups_side_by_side_are_paired():
    a, b = [0.5, 0.6, 0.7], [0.51, 0.611, 0.712]  # by 0.010, 0.011, 0.012: t(0.975, 2) = 4.302653
    interval = of(b, a, paired=True).difference("0", "1").interval_at()
    assert interval.low == pytest.approx(0.011 - 4.302653 * 0.001 / math.sqrt(3))


def test_the_variance_is_pooled():
    """Of three groups with variance 1e-4 each: 6 degrees of freedom, as in an analysis of variance."""
    spread = np.array([-0.01, 0.0, 0.01])
    found = of(0.8 + spread, 0.83 + spread, 0.5 + spread).difference("1", "0")
    assert found.pooled.freedom == 6
    assert found.pooled.error == pytest.approx(0.01 * math.sqrt(2 / 3))
    assert found.own.freedom == pytest.approx(4)
    assert found.above(0.03) == pytest.approx(scipy.t.sf(0.03 / found.pooled.error, 6))


def test_a_noisy_group_borrows_no_certainty():
    spread = np.array([-0.01, 0.0, 0.01])
    found = of(0.8 + 10 * spread, *[0.83 + spread] * 2).difference("1", "0")
    welch = scipy.ttest_ind(0.83 + spread, 0.8 + 10 * spread, equal_var=False)
    assert found.pooled.error == pytest.approx(abs(0.03 / welch.statistic))  # its own, not the pooled one
    assert 2 * found.above(0.03) >= welch.pvalue / GUARD


def test_what_seeds_share_is_taken_out():
    """Of many variants: a shift of all of a seed's values changes no difference's error."""
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, (6, 4))
    shifted = values + np.array([0, 50, -20, 7])
    assert of(*shifted).variance == pytest.approx(of(*values).variance)
    few = values[:3, :3]
    assert of(*few).freedom == 6  # blocks would leave 4 degrees of freedom


def test_missing_values_are_allowed_for():
    values = {"a": {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.2}, "b": {0: 1.5, 1: 2.4}, "c": {0: 1.1, 1: 2.2, 2: 2.9, 3: 4.0}}
    values |= {"d": dict(values["a"]), "e": {k: v + 0.1 for k, v in values["c"].items()}}
    found = Comparison.of(values)
    assert found.freedom == 18 - 5 - 3
    assert found.difference("b", "a").mean == pytest.approx(
        0.375
    )  # not 1.95 - 2.55: what blocks 2 and 3 add is taken out


def test_worse_than_the_best_of_two_is_the_t_test():
    a, b = [0.70, 0.75, 0.73], [0.80, 0.81, 0.82]
    assert of(b, a).worse_than("0", ["1"]) == [pytest.approx(scipy.ttest_ind(b, a, equal_var=False).pvalue)]


def test_worse_than_the_best_steps_down():
    """The widest range by the studentized range of all, the narrower ones only if it is significant."""
    spread = np.array([-0.01, 0.0, 0.01])
    compared = of(0.80 + spread, 0.78 + spread, 0.70 + spread)
    near, far = compared.worse_than("0", ["1", "2"])
    width, t = 0.1 / 0.01 * math.sqrt(3), 0.02 / (0.01 * math.sqrt(2 / 3))
    pooled, own = (scipy.studentized_range.sf(width, 3, freedom) for freedom in (6, 4))
    assert far == pytest.approx(max(pooled, own / GUARD), rel=1e-3)
    assert near == pytest.approx(max(2 * scipy.t.sf(t, 6), 2 * scipy.t.sf(t, 4) / GUARD), rel=1e-3)
    equal = of(0.80 + spread, 0.80 + spread, 0.80 + spread).worse_than("0", ["1", "2"])
    assert equal == [1.0, 1.0]


def test_shares():
    """Without clustering it is Clopper and Pearson's interval; processes that differ widen it."""
    exact = scipy.binomtest(5, 100).proportion_ci(0.95)
    even = share_interval([(1, 20)] * 5)
    assert (even.low, even.high) == (pytest.approx(exact.low), pytest.approx(exact.high))
    clustered = share_interval([(5, 20), *[(0, 20)] * 4])
    assert clustered.high > 2 * even.high
    assert share_interval([(0, 29)]).high == pytest.approx(1 - 0.025 ** (1 / 29))
    assert share_interval([]).high == 1


def test_confirmed_runs_alone_decide():
    lucky = trial_record(1, 1, 0.99)
    steady = trial_record(2, 2, 0.90)
    confirmed = [
        trial_record(i, s, a, "confirm") for i, s, a in ((1, 100, 0.70), (1, 101, 0.72), (2, 100, 0.88), (2, 101, 0.9))
    ]
    ranked = rank([lucky, steady, *confirmed])
    assert [one.name for one in ranked] == ["sample 2", "sample 1"]
    assert ranked[0].estimate.mean == pytest.approx(0.89)
    assert winning_trial(ranked[0]).seed == 101


def test_what_cannot_be_told_apart_is_a_tie():
    close = [
        trial_record(i, s, a)
        for i, s, a in ((1, 0, 0.80), (1, 1, 0.82), (1, 2, 0.81), (2, 0, 0.81), (2, 1, 0.80), (2, 2, 0.82))
    ]
    far = [trial_record(3, s, a) for s, a in ((0, 0.50), (1, 0.53), (2, 0.51))]
    ranked = rank(close + far)
    assert [one.tied for one in ranked] == [False, True, False]
    assert ranked[-1].name == "sample 3"
    assert ranked[-1].p < 1e-4


def test_unfinished_trials_cannot_win():
    ranked = rank(
        [trial_record(1, 0, 0.9, status="stopped"), trial_record(2, 0, 0.8, status="diverged"), trial_record(3, 0, 0.5)]
    )
    assert [one.name for one in ranked] == ["sample 3"]
    assert rank([]) == []


@pytest.mark.parametrize("status", ["diverged", "failed", "oom"])
def test_a_failed_seed_ranks_below(status):
    """Whatever the other seeds of the configuration reached: it may fail again."""
    best = [trial_record(1, s, a) for s, a in ((0, 0.95), (1, 0.96))] + [trial_record(1, 2, 0.1, status=status)]
    other = [trial_record(2, s, a) for s, a in ((0, 0.70), (1, 0.72), (2, 0.71))]
    ranked = rank([*best, *other])
    assert [one.name for one in ranked] == ["sample 2", "sample 1"]
    assert [len(one.failed) for one in ranked] == [0, 1]
    assert not ranked[1].tied


def test_loss_is_ranked_upwards():
    ranked = rank([trial_record(1, 0, 0.9), trial_record(2, 0, 0.8)], "val_loss")
    assert ranked[0].name == "sample 1"


def test_two_equal_runs_do_not_make_certainty():
    ranked = rank([trial_record(i, s, a) for i, s, a in ((1, 0, 0.8), (1, 1, 0.8), (2, 0, 0.7), (2, 1, 0.75))])
    assert ranked[0].estimate.mean == 0.8
    assert math.isnan(ranked[0].estimate.low)
    assert ranked[1].tied
    alike = rank([trial_record(i, s, a) for i, s, a in ((1, 0, 0.8), (1, 1, 0.8), (2, 0, 0.7), (2, 1, 0.7))])
    assert alike[1].tied  # no deviation is known
    assert math.isnan(alike[1].p)


def test_unequal_numbers_of_seeds_are_ranked_by_the_model():
    """Seeds 0 to 2 are lucky for all: the configuration that has only these is not the best for that."""
    luck = [0.05, 0.05, 0.05, *[0.0] * 17]
    noise = np.random.default_rng(0).normal(0, 0.002, (3, 20))
    records = [trial_record(1, s, 0.78 + luck[s] + noise[0, s]) for s in range(3)]
    records += [trial_record(i, s, 0.80 + luck[s] + noise[i - 1, s]) for i in (2, 3) for s in range(20)]
    assert rank(records)[-1].name == "sample 1"


def test_the_search_ranks_if_no_confirmation_has_finished():
    searched = [trial_record(1, 1, 0.9), trial_record(2, 2, 0.8)]
    diverged = [trial_record(i, 100, 0.1, "confirm", "diverged") for i in (1, 2)]
    assert [one.name for one in rank([*searched, *diverged])] == ["sample 1", "sample 2"]


@pytest.mark.parametrize(("treatments", "blocks"), [(2, 2), (3, 5), (7, 20), (12, 7), (12, 13), (14, 20)])
def test_the_variance_with_blocks_is_that_of_the_table(treatments, blocks):
    """Two-way analysis of variance: the normal equations are singular, and no rounding may show in the residuals."""
    y = 0.75 + np.random.default_rng(0).normal(0, 0.004, (treatments, blocks))
    residuals = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    found = of(*y, paired=True)
    assert found.freedom == (treatments - 1) * (blocks - 1)
    assert found.variance == pytest.approx(np.square(residuals).sum() / found.freedom, rel=1e-6)
