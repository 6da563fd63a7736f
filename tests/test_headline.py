"""The headline in the cases where it is easily wrong: each has a sentence of its own."""

import numpy as np
import pytest
from conftest import run_record, trial_record

from harness.reporting.headline import headline, mean_test_accuracy
from harness.run.directory import RunDirectory
from harness.run.records import LookRecord, write_correct, write_trial
from harness.stats.claims import judge_claims
from harness.stats.ranking import rank
from tune_spaces import Claim, Space

SPACE = Space(trial={}, variants={"a": {}, "b": {"epochs": 1}})


def told(tmp_path, records, tests=(), images=10_000, by_class=(1000, 1000)):
    """The lines of the headline; `tests`: test accuracies of the best configuration's seeds."""
    recorded = run_record(SPACE)
    recorded.claims = []
    recorded.data.test, recorded.data.test_by_class, recorded.data.classes = images, list(by_class), ["cat", "dog"]
    ranked = rank(records)
    for record, accuracy in zip(ranked[0].records if ranked else [], tests, strict=False):
        record.metrics.test_accuracy = accuracy
    return headline(RunDirectory(tmp_path), recorded, ranked, records=records).lines


def of(index, accuracies, status="finished"):
    found = [trial_record(index, seed, accuracy) for seed, accuracy in enumerate(accuracies)]
    return [*found, trial_record(index, len(found), 0.1, status=status)] if status != "finished" else found


HIGHEST = "best: sample 1 has the highest mean validation accuracy of"
GOOD, EQUAL, WORSE = (0.80, 0.82, 0.81), (0.81, 0.80, 0.82), (0.50, 0.53, 0.51)
CASES = {
    "nothing finished": ([trial_record(1, 0, 0.1, status="diverged")], "best: no trial has finished"),
    "one configuration": (of(1, GOOD), "best: sample 1, the only configuration"),
    "a clear winner": (
        [*of(1, GOOD), *of(2, WORSE)],
        f"{HIGHEST} 2 configurations, better than the other at 95 %",
    ),
    "a tie": (
        [*of(1, GOOD), *of(2, EQUAL), *of(3, WORSE)],
        f"{HIGHEST} 3 configurations; not shown to be better than sample 2",
    ),
    "one seed each": (
        [*of(1, [0.9]), *of(2, [0.1])],
        "best: sample 1 has the highest validation accuracy of 2 single runs; one seed each cannot show that it is "
        "best",
    ),
    "a diverged seed": (
        [*of(1, (0.95, 0.96), "diverged"), *of(2, WORSE)],
        "reservation: 1 of 3 seeds of sample 1 failed (diverged), which ranks it below configurations with fewer "
        "failed seeds",
    ),
    "a failed seed is not beaten": (
        [*of(1, (0.95, 0.96), "diverged"), *of(2, WORSE)],
        "best: sample 2 is the only configuration with no failed seeds",
    ),
    "a tie beside a failed seed": (
        [*of(1, GOOD), *of(2, EQUAL), *of(3, (0.9, 0.9), "diverged")],
        f"{HIGHEST} 2 configurations with as few failed seeds; not shown to be better than sample 2",
    ),
    "all seeds of another failed": (
        [*of(1, GOOD), *(trial_record(2, seed, 0.1, status="diverged") for seed in range(3))],
        "reservation: no trial of sample 2 has finished (diverged)",
    ),
    "no confirmation": (
        [*of(1, [0.9]), *of(2, [0.8]), trial_record(1, 100, 0.1, "confirm", "diverged")],
        "reservation: no trial on a fresh seed has finished: the ranking is that of the search",
    ),
    "one seed against several": (
        [*of(1, [0.83]), *of(2, EQUAL), *of(3, GOOD)],
        "best: sample 1 has the highest validation accuracy of 3 configurations, in a single run; not shown to be "
        "better than sample 2, sample 3",
    ),
    "a failed seed of the best": (
        [*of(1, (0.95, 0.96), "failed"), *of(2, WORSE[:2], "oom")],
        "reservation: 1 of 3 seeds of sample 1 failed (failed)",
    ),
    "two seeds that agree": (
        [*of(1, (0.8, 0.8)), *of(2, (0.7, 0.75))],
        "reservation: the 2 seeds of sample 1 are alike, so how much seeds differ is unknown",
    ),
    "all seeds alike": (
        [*of(1, (0.8,) * 3), *of(2, (0.7,) * 3)],
        f"{HIGHEST} 2 configurations; not shown to be better than sample 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_case_is_told(case, tmp_path):
    records, line = CASES[case]
    assert line in told(tmp_path, records)


@pytest.mark.parametrize(("images", "half"), [(160, "4.69"), (30, "11.08"), (500, "2.64"), (10_000, None)])
def test_few_test_images_are_told(images, half, tmp_path):
    lines = [line for line in told(tmp_path, of(1, GOOD), images=images) if "test images:" in line]
    expected = f"reservation: {images} test images: an accuracy of 90 % would be known to ±{half} points only"
    assert lines == ([] if half is None else [expected])


def test_a_class_with_one_test_image_is_told(tmp_path):
    lines = told(tmp_path, of(1, GOOD), by_class=(9999, 1))
    assert "reservation: classes with fewer than 10 test images, whose own accuracy says little: dog (1)" in lines


def test_what_the_interval_covers(tmp_path):
    """Seeds and test images apart. Without the images of each trial, the binomial part; with them, what they show."""
    line = next(one for one in told(tmp_path, of(1, GOOD), (0.78, 0.80, 0.79)) if one.startswith("Test"))
    assert (
        line
        == "Test accuracy: 79.00 %, mean of 3 seeds (other seeds: ±2.48 points; other test images: 78.19 to 79.79 %)"
    )
    (single,) = (one for one in told(tmp_path, of(1, [0.8]), [0.78]) if one.startswith("Test"))
    assert single.startswith("Test accuracy: 78.00 % (one seed: what other seeds would change is unknown; ")
    assert "all 2 seeds alike: what others would change is unknown" in mean_test_accuracy([0.8, 0.8], 100, None)
    independent = np.random.default_rng(0).random((100, 1000)) < 0.8  # each seed right on other images
    assert "other test images: 79.7" in mean_test_accuracy([0.8] * 100, 1000, independent)


def test_the_images_that_trials_classify_correctly_are_used(tmp_path):
    records = of(1, GOOD)
    for record in records:
        folder = RunDirectory(tmp_path).trial_folder(record.id)
        folder.mkdir(parents=True)
        record.correct_sha256 = write_correct(folder, np.arange(1000) < 800)
    line = next(one for one in told(tmp_path, records, (0.8, 0.8, 0.8), images=1000) if one.startswith("Test"))
    assert "other test images: 77.41 to 82.36 %" in line  # all seeds on the same 800


def test_seeds_added_without_a_plan_are_told(tmp_path):
    recorded = run_record(SPACE)
    recorded.claims = [vars(Claim("b beats a", "b", "a"))]
    recorded.looks = [LookRecord(seeds=n, alpha=0.05, claims=1, settled=0) for n in (3, 5)]
    lines = headline(RunDirectory(tmp_path), recorded, rank(of(1, GOOD))).lines
    assert any("tested after 3, 5 seeds, which were not all planned" in line and "up to 10 %" in line for line in lines)
    recorded.looks = [LookRecord(seeds=n, alpha=0.01, claims=1, settled=0) for n in (3, 5, 8, 13, 20)]
    lines = headline(RunDirectory(tmp_path), recorded, rank(of(1, GOOD))).lines
    assert not any("not all planned" in line for line in lines)


@pytest.mark.parametrize(
    ("schedule", "early_stop", "causes"),
    [
        (
            "constant",
            4,
            "usual causes: a constant learning rate (avoided by trial.schedule.name=linear) and an early stop (by",
        ),
        ("linear", None, None),
    ],
)
def test_what_too_noisy_seeds_cannot_settle_is_told(schedule, early_stop, causes, tmp_path):
    records = []
    for variant in "ab":
        for seed, accuracy in enumerate((0.7, 0.75, 0.8)):
            record = trial_record(seed, seed, accuracy, variant=variant)
            record.config = {"batch_size": ord(variant), "schedule": {"name": schedule}, "early_stop": early_stop}
            record.metrics.test_accuracy = record.metrics.train_accuracy = accuracy
            records.append(record)
            write_trial(RunDirectory(tmp_path).trial_folder(f"{variant}{seed}"), record)
    findings = judge_claims([Claim("b beats a", "b", "a")], records)
    *_, line = headline(
        RunDirectory(tmp_path), run_record(SPACE), rank(records), findings=findings, records=records
    ).reservations
    assert line.startswith("seeds differ by up to 5.0 points (standard deviation), too much to settle 1 claim with 20")
    assert causes in line if causes else "causes" not in line
