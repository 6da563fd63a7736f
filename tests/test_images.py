"""What the test images say: the part of an uncertainty that other images would change, and the floor of the seeds'."""

import numpy as np
import pytest

from harness.stats.images import deviation_floor, image_margin


def test_the_floor_is_the_deviation_of_independent_images():
    generator = np.random.default_rng(0)
    chances = generator.random(2000)
    correct = generator.random((400, 2000)) < chances
    assert deviation_floor(correct) == pytest.approx(np.std(correct.mean(1), ddof=1), rel=0.1)
    assert deviation_floor(correct[:3]) == pytest.approx(deviation_floor(correct), rel=0.05)  # unbiased at few seeds
    assert np.isnan(deviation_floor(correct[:1]))
    assert deviation_floor(np.tile(correct[0], (5, 1))) == 0


def test_the_margin_of_other_images():
    """Of one network the binomial one; of two, paired by image, that of the images on which they differ."""
    right = np.arange(1000)[None] < 800
    assert image_margin(right) == pytest.approx(1.96 * np.sqrt(0.8 * 0.2 / 999), rel=1e-4)
    assert image_margin(right, right) == 0
    other = right.copy()
    other[0, :10] = False
    assert image_margin(right, other) == pytest.approx(1.96 * np.sqrt(0.01 * 0.99 / 999), rel=1e-4)
