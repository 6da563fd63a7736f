"""What the test images say: the part of an uncertainty that other images would change, and the floor of the seeds'."""

import numpy as np
import pytest

from harness.stats.accuracy import change_interval
from harness.stats.images import deviation_floor, effective_images, image_margin


def test_the_floor_is_the_deviation_of_independent_images():
    generator = np.random.default_rng(0)
    chances = generator.random(2000)
    correct = generator.random((400, 2000)) < chances
    assert deviation_floor(correct) == pytest.approx(np.std(correct.mean(1), ddof=1), rel=0.1)
    assert deviation_floor(correct[:3]) == pytest.approx(deviation_floor(correct), rel=0.05)  # unbiased at few seeds
    assert np.isnan(deviation_floor(correct[:1]))
    assert deviation_floor(np.tile(correct[0], (5, 1))) == 0


def test_the_margin_of_other_images():
    """Of two networks, paired by image, that of the images on which they differ; never nothing."""
    right = np.arange(1000)[None] < 800
    other = right.copy()
    other[0, :20] = False
    assert image_margin(right, other) == pytest.approx(1.96 * np.sqrt(0.02 * 0.98 / 999), rel=1e-4)
    assert image_margin(right, right) == pytest.approx(change_interval(0, 0, 1000).high)


def test_effective_images():
    """Of one network, or of several that are right on the same images, as many as there are; of others more."""
    right = np.arange(1000)[None] < 800
    assert effective_images(right) == effective_images(np.repeat(right, 3, axis=0)) == pytest.approx(1000)
    independent = np.random.default_rng(0).random((50, 1000)) < 0.8
    assert effective_images(independent) > 20_000
    assert effective_images(np.full((1, 30), True)) == 30
