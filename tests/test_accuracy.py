"""The accuracy gate: Tango's interval, its three outcomes, and its error rates as exact sums."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest

from harness.stats.accuracy import Gate, accuracy_interval, can_pass, change_interval, score, z_limit

ORDER = ["fails", "too few images", "passes"]


def test_tangos_example():
    """44 pairs, one lost: the interval that his paper (1998) gives for the contact lens data."""
    found = change_interval(1, 0, 44)
    assert (found.low, found.high) == (pytest.approx(-0.1181, abs=1e-4), pytest.approx(0.0594, abs=1e-4))


@pytest.mark.parametrize(
    ("lost", "gained", "images", "change"), [(3, 1, 100, -0.05), (10, 20, 500, 0.01), (1, 9, 40, -0.2)]
)
def test_the_score_is_that_of_the_constrained_likelihood(lost, gained, images, change):
    """Maximised here by search, there in closed form."""

    def unlikely(q):
        rest = images - lost - gained
        return -(lost * math.log(q) + gained * math.log(q + change) + rest * math.log(1 - 2 * q - change))

    bounds = (max(0, -change) + 1e-12, (1 - change) / 2 - 1e-12)
    q = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    expected = (gained - lost - images * change) / math.sqrt(images * (2 * q + change - change**2))
    assert score(lost, gained, images, change) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("images", [30, 160, 764, 765, 10_000])
def test_a_file_equal_on_all_images(images):
    """It passes from 765 images on; before, it is too few images and never fails."""
    gate = Gate.of(0, 0, images, 0.005)
    assert gate.outcome == ("passes" if images >= 765 else "too few images")
    assert gate.needed == (None if images >= 765 else 765)
    assert can_pass(images, 0.005) == (images >= 765)
    assert gate.change.low < 0 < gate.change.high


def test_sentences():
    assert str(Gate.of(0, 0, 160, 0.005)) == (
        "accuracy +0.00 [-2.34, +2.34] points on 160 test images; too few images to exclude a drop of more than 0.5 "
        "points (about 765 would do)"
    )
    assert str(Gate.of(20, 15, 10_000, 0.005)) == "accuracy -0.05 [-0.17, +0.07] points on 10,000 test images"
    assert "a drop of more than 0.5 points, which is more than is allowed" in str(Gate.of(30, 0, 160, 0.005))
    assert "more images like these would not show it either" in str(Gate.of(3, 0, 160, 0.005))


@pytest.mark.parametrize("allowed", [0.0, 0.005, 0.05, 0.3])
@pytest.mark.parametrize("images", [30, 61])
def test_outcomes_are_monotone(images, allowed):
    """One more lost image never helps, one more gained never harms."""
    ranks = np.full((images + 1, images + 1), np.nan)
    for lost in range(images + 1):
        for gained in range(images + 1 - lost):
            statistic = score(lost, gained, images, -allowed)
            ranks[lost, gained] = (statistic >= z_limit()) - (statistic <= -z_limit())
    down, right = np.diff(ranks, axis=0), np.diff(ranks, axis=1)
    assert not (down[~np.isnan(down)] > 0).any()
    assert not (right[~np.isnan(right)] < 0).any()
    lost = int(np.flatnonzero(ranks[:, 0] == -1)[0]) if (ranks[:, 0] == -1).any() else images
    assert Gate.of(lost, 0, images, allowed).outcome == ORDER[int(ranks[lost, 0]) + 1]


def chance_to_pass(images, allowed, lost_share, gained_share):
    """Exact sum over how many images are lost and gained."""
    disagreeing = np.arange(images + 1)
    chances, total = binom.pmf(disagreeing, images, lost_share + gained_share), 0.0
    for count in disagreeing[chances > 1e-9]:
        low, high = -1, int(count)  # the most that may be lost of these, by bisection: the outcome is monotone
        while low < high:
            middle = (low + high + 1) // 2
            passes = score(middle, count - middle, images, -allowed) >= z_limit()
            low, high = (middle, high) if passes else (low, middle - 1)
        total += chances[count] * binom.cdf(low, count, lost_share / (lost_share + gained_share))
    return total


SIZES = [30, 50, 100, 160, 320, 764, 765, 1000, 3000, pytest.param(10_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("allowed", [0.005, 0.02])
def test_twice_the_allowed_drop_rarely_passes(images, allowed):
    """However many images are lost and gained beside that."""
    for gained in (0.0, 0.001, 0.01, 0.1, 0.45):
        assert chance_to_pass(images, allowed, gained + 2 * allowed, gained) <= 0.05


def test_accuracy_interval():
    """Wilson's, which has a width for a perfect score too."""
    perfect = accuracy_interval(1.0, 160)
    assert (perfect.mean, perfect.high) == (1, pytest.approx(1))
    assert perfect.low == pytest.approx(1 / (1 + z_limit() ** 2 / 160))
    exact, found = binomtest(156, 160).proportion_ci(0.95, method="wilson"), accuracy_interval(0.975, 160)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
