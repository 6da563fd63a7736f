"""Networks that learned nothing: they are named, rank below those that did, and nothing of theirs is recommended."""

import pytest
from conftest import run_record, trial_record

from harness.reporting.headline import headline
from harness.run.chance import is_chance
from harness.run.directory import RunDirectory
from harness.run.recommendation import Recommendation
from harness.stats.ranking import rank


@pytest.mark.parametrize(
    ("accuracy", "chance", "images", "at_chance"),
    [
        (0.1000, 0.1, 5000, True),  # one class for all images
        (0.1060, 0.1, 5000, True),
        (0.1100, 0.1, 5000, False),
        (0.9000, 0.9, 500, True),  # nine of ten images are of one class
        (0.9500, 0.9, 500, False),
        (0.0500, 0.1, 500, True),
        (0.1000, 0.1, 20, True),
        (0.1500, 0.1, 20, False),  # too few images for a test
        (0.5000, 0.5, 2, True),
        (1.0000, 0.5, 2, False),
    ],
)
def test_chance_level(accuracy, chance, images, at_chance):
    assert is_chance(accuracy, chance, images) == at_chance


def of(index, accuracies, stage="search", chance=0.1, images=5000):
    found = [trial_record(index, seed, accuracy, stage) for seed, accuracy in enumerate(accuracies)]
    for record in found:
        record.metrics.val_chance, record.metrics.val_images = chance, images
    return found


def test_a_seed_at_chance_counts_as_failed():
    """Else its configuration would have an interval from 0 to 1, and be tied with the best."""
    first, second = rank([*of(1, [0.1, 0.76], "confirm"), *of(2, [0.74, 0.75], "confirm")])
    assert (first.name, len(first.failed), len(first.records)) == ("sample 2", 0, 2)
    assert (second.name, len(second.failed), len(second.records)) == ("sample 1", 1, 1)
    assert not second.tied


def test_a_configuration_at_chance_is_worse_by_its_mean():
    first, second = rank([*of(1, [0.1, 0.1, 0.1]), *of(2, [0.3, 0.31, 0.32])])
    assert (first.name, second.name, len(second.failed), second.is_worse) == ("sample 2", "sample 1", 0, True)


def test_records_of_earlier_versions_have_no_level():
    records = of(1, [0.1, 0.76])
    for record in records:
        record.metrics.val_chance = None
    assert [len(one.records) for one in rank(records)] == [2]


def told(tmp_path, records):
    recommended = Recommendation(id="x", batch_size=1, sentence="ship model_int8.onnx")
    found = headline(RunDirectory(tmp_path), run_record(), rank(records), None, recommended, [], records)
    return "\n".join(found.lines)


@pytest.mark.parametrize(
    ("accuracies", "chance", "images"),
    [([0.1, 0.1], 0.1, 5000), ([0.9, 0.9], 0.9, 500), ([0.104], 0.1, 5000), ([0.5, 0.5, 0.5], 0.5, 20)],
)
def test_a_winner_at_chance_is_no_winner(accuracies, chance, images, tmp_path):
    said = told(tmp_path, of(1, accuracies, chance=chance, images=images))
    assert "best: no winner: sample 1, which comes first, answers no better than always the most frequent" in said
    assert "Recommendation: none: there is no winner" in said
    assert "ship" not in said


def test_a_seed_at_chance_is_named(tmp_path):
    said = told(tmp_path, [*of(1, [0.1, 0.76]), *of(2, [0.74, 0.75])])
    assert "best: sample 2" in said
    assert "1 of 2 seeds of sample 1 failed (at chance level), which ranks it below" in said


def test_an_interval_that_says_nothing_is_named(tmp_path):
    said = told(tmp_path, of(1, [0.45, 0.76]))
    assert "the interval of sample 1 over 2 seeds, 0.00 to 100.00 %, says nothing" in said
