"""Intervals against known values; rankings that do not fall for luck."""

import math

import pytest

from harness import stats


def test_mean_interval():
    # mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776445
    estimate = stats.mean_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (estimate.mean, estimate.n) == (3, 5)
    assert estimate.low == pytest.approx(3 - half, abs=1e-5)
    assert estimate.high == pytest.approx(3 + half, abs=1e-5)
    assert math.isnan(stats.mean_interval([1.0]).low)


def test_ratio_interval_covers_a_constant_ratio():
    estimate = stats.ratio_interval([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert estimate.mean == pytest.approx(2)
    assert estimate.low == pytest.approx(2)


def test_differences_are_paired_by_seed():
    reference = {0: 0.5, 1: 0.6, 2: 0.7}
    better = {seed: value + 0.01 for seed, value in reference.items()}
    paired = stats.difference_interval(better, reference)
    assert paired.low == pytest.approx(0.01)
    unpaired = stats.difference_interval({seed + 10: value for seed, value in better.items()}, reference)
    assert unpaired.low < 0 < unpaired.high


def record(index, seed, accuracy, stage="search", status="finished", variant=""):
    return {
        "id": f"{index}-{seed}",
        "stage": stage,
        "status": status,
        "variant": variant,
        "index": index,
        "seed": seed,
        "parameters": {"x": index} if index else {},
        "config": {"x": index},
        "metrics": {"val_accuracy": accuracy, "val_loss": 1 - accuracy},
    }


def test_confirmed_runs_alone_decide():
    lucky = record(1, 1, 0.99)
    steady = record(2, 2, 0.90)
    confirmed = [
        record(i, s, a, "confirm") for i, s, a in ((1, 100, 0.70), (1, 101, 0.72), (2, 100, 0.88), (2, 101, 0.9))
    ]
    ranked = stats.ranking([lucky, steady, *confirmed])
    assert [one.name for one in ranked] == ["sample 2", "sample 1"]
    assert ranked[0].estimate.mean == pytest.approx(0.89)
    assert stats.winning_trial(ranked[0])["seed"] == 101


def test_what_cannot_be_told_apart_is_a_tie():
    close = [
        record(i, s, a)
        for i, s, a in ((1, 0, 0.80), (1, 1, 0.82), (1, 2, 0.81), (2, 0, 0.81), (2, 1, 0.80), (2, 2, 0.82))
    ]
    far = [record(3, s, a) for s, a in ((0, 0.50), (1, 0.52), (2, 0.51))]
    ranked = stats.ranking(close + far)
    assert [one.tied for one in ranked] == [False, True, False]
    assert ranked[-1].name == "sample 3"


def test_unfinished_trials_cannot_win():
    ranked = stats.ranking(
        [record(1, 0, 0.9, status="stopped"), record(2, 0, 0.8, status="diverged"), record(3, 0, 0.5)]
    )
    assert [one.name for one in ranked] == ["sample 3"]
    assert stats.ranking([]) == []


def test_loss_is_ranked_upwards():
    ranked = stats.ranking([record(1, 0, 0.9), record(2, 0, 0.8)], "val_loss")
    assert ranked[0].name == "sample 1"


def test_two_equal_runs_do_not_make_certainty():
    ranked = stats.ranking([record(1, 0, 0.8), record(1, 1, 0.8), record(2, 0, 0.7), record(2, 1, 0.75)])
    assert ranked[0].estimate.mean == 0.8
    assert math.isnan(ranked[0].estimate.low)
