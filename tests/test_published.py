"""docs/published.md says what the trials under benchmarks/results say, to the last digit."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_record

from harness.config.keys import merge, nested
from harness.config.plugins import load
from harness.reporting.results import findings_of, variants_of
from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest
from harness.run.recommendation import Recommendation
from harness.run.records import TRIAL_FILE, TrialRecord
from harness.search.resolution import load_space, resolve
from harness.stats.claims import judge_claims
from harness.stats.intervals import Estimate, seeds_interval
from harness.stats.ranking import rank
from harness.stats.sequential import looks_of
from tune_spaces import Space

TOP = Path(__file__).parent.parent
RESULTS = TOP / "benchmarks" / "results"
RUN = RunDirectory(RESULTS / "published")
DECAY = RunDirectory(RESULTS / "decay")
ANNEALED = RunDirectory(RESULTS / "annealed")
FIRST, NARROWED, PILOT, WARMED = (
    RunDirectory(RESULTS / "recipe" / name) for name in ("first", "narrowed", "pilot", "warmed")
)
PAGE = TOP / "docs" / "published.md"
SPACE = load("tune_spaces", "published", "SPACE")


READ_AS = {"trial": TrialRecord, "manifest": Manifest, "verdict": Recommendation}


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.*")), ids=lambda path: str(path.relative_to(RESULTS)))
def test_every_result_reads(path):
    if path.suffix == ".csv":
        assert len(pd.read_csv(path))
    elif path.suffix == ".json":
        value = json.loads(path.read_text())
        assert value
        if path.stem in READ_AS:
            seal = value.pop("sha256", None)
            assert READ_AS[path.stem].model_validate(value).to_json() == value
            assert seal is None or storage.read_json(path) == value


def sentences(space: Space, records: list[TrialRecord]) -> list[str]:
    return [f"- {finding.sentence}." for finding in findings_of(run_record(space), records)]


def interval(test: Estimate) -> str:
    return f"{test.mean:.4f} [{test.low:.4f}, {test.high:.4f}]"


def published() -> list[str]:
    """Rows of the table, and what became of the claims."""
    machines = {r.variant: r.environment.cpu for r in RUN.trials()}
    lines = []
    for one in variants_of(run_record(SPACE), RUN.trials()):
        published = one.published
        cells = [
            f"`{one.variant}`",
            "" if published is None else f"{published:.4f}",
            interval(one.test),
            str(one.test.n),
            f"{one.epochs:.1f}",
            f"{one.seconds:,.0f}",
            machines[one.variant],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + sentences(SPACE, RUN.trials())


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def transferred(name: str) -> list[TrialRecord]:
    """Records of a table under results/transfer."""
    rows = pd.read_csv(RESULTS / "transfer" / f"{name}.csv").to_dict("records")
    known = [{str(key): value for key, value in row.items() if value == value} for row in rows]  # not NaN
    return [TrialRecord.model_validate(nested(row)) for row in known]


def transfer() -> list[str]:
    """Ends of the rows of its table, and its sentences."""
    (block,) = blocks()
    shown: dict = {}
    exec(block, shown)
    space, records = shown["SPACE"], transferred("transfer")
    ends = [f"| {interval(v.test)} | {v.seconds:.0f} |" for v in variants_of(run_record(space), records)]
    return ends + sentences(space, records)


def recipe() -> list[str]:
    """Rows of its table, the samples that ASHA left; its sentences about all else."""
    lines = []
    for run, name in ((FIRST, "wide"), (NARROWED, "narrowed"), (WARMED, "warmed")):
        searched = [record for record in run.trials() if record.stage == "search"]
        for record in sorted(searched, key=lambda r: r.index):
            config, metrics = record.config, record.metrics
            values = (config["optimizer"]["lr"], config["optimizer"]["weight_decay"], config["label_smoothing"])
            cells = [f"{name}, {record.index}", *(f"{v:.2g}" for v in (*values, config["options"]["dropout"]))]
            cells += [f"{config['augmentation']['crop_padding']}", f"{config['schedule']['warmup_epochs']:g}"]
            cells += [f"{metrics.of(part):.4f}" for part in ("train_accuracy", "val_accuracy")]
            if record.status == "finished":
                lines.append(f"| {' | '.join(cells)} |")
        stopped = sum(record.status == "stopped" for record in searched)
        lines.append(f"{stopped} of {len(searched)} samples of the {name} search")
    lines += [f"`{record.variant}` {record.metrics.val_accuracy:.4f}" for record in PILOT.trials()]
    for run in (NARROWED, WARMED):
        (best,) = rank(run.trials())
        tested = seeds_interval([r.metrics.of("test_accuracy") for r in best.records])
        lines.append(f"test accuracy {interval(tested)} over {tested.n} fresh seeds")
        lines.append(f"{best.estimate.mean:.4f} on the validation images")
    return lines


def decay() -> list[str]:
    """The finding of the experiment on weight decay, and each variant's gap."""
    space = load_space(str(DECAY.path / "space.py"))
    lines = sentences(space, DECAY.trials())
    for name in space.variants:
        records = [record for record in DECAY.trials() if record.variant == name]
        trained, tested = (np.mean([r.metrics.of(f"{part}_accuracy") for r in records]) for part in ("train", "test"))
        lines.append(f"`{name}` {trained:.3f} and {tested:.3f}")
    return lines


def annealed() -> list[str]:
    """The findings at the looks so far, and how much less seeds differ than under the published recipe."""
    space, trials = load_space("annealed"), ANNEALED.trials()
    lines = [f"- {one.sentence}." for one in judge_claims(space.claims, trials, looks_of("auto"))]
    lines.append(f"with {len(trials)} trials: ")
    before = {r.variant: [] for r in RUN.trials()}
    for record in RUN.trials():
        before[record.variant].append(record.metrics.of("test_accuracy"))
    recorded = run_record(space)
    recorded.data.test = 10_000
    for one in variants_of(recorded, trials, ANNEALED):
        figures = [100 * np.std(one.values, ddof=1), 100 * one.floor, 100 * np.std(before[one.variant], ddof=1)]
        lines.append(f"| `{one.variant}` | {interval(one.test)} | {' | '.join(f'{v:.2f}' for v in figures)} |")
    return lines


def remarks() -> list[str]:
    """What it says about the seeds of the variants that have five, and about validation against test of `final`."""
    lines, harder = [], []
    for name in SPACE.variants:
        records = [record for record in RUN.trials() if record.variant == name]
        epochs, tested, validated = (
            [r.metrics.of(key) for r in records] for key in ("epochs", "test_accuracy", "val_accuracy")
        )
        if len(records) == 5:
            lines.append(f"{np.corrcoef(epochs, tested)[0, 1]:.2f} in `{name}`")
        if name.startswith("final"):
            harder.append(100 * (np.mean(validated) - np.mean(tested)))
    return [*lines, f"harder for `final`, by {min(harder):.1f} to {max(harder):.1f} points in each variant"]


def cache() -> list[str]:
    """Ends of the rows of the table of cached features."""
    ends = []
    for variant in ("head", "layer4"):
        anew, first, later = (
            next(r.timing.wall_seconds for r in transferred(name) if (r.variant, r.seed) == (variant, seed))
            for name, seed in (("uncached", 0), ("cached", 0), ("cached", 1))
        )
        ends.append(f"| {anew:.1f} s | {first:.1f} s | {later:.1f} s | {anew / later:.1f} |")
    return ends


@pytest.mark.parametrize("lines", [published, decay, annealed, recipe, remarks, transfer, cache])
def test_the_page_has_every_figure(lines):
    page = " ".join(PAGE.read_text().split())  # however its lines are broken
    missing = [line for line in lines() if " ".join(line.split()) not in page]
    assert not missing, "docs/published.md has to say:\n" + "\n".join(lines())


def test_every_row_was_trained():
    """Those that need a download aside; a history and a record each, with nobody's paths in them."""
    trained = Counter(record.variant for record in RUN.trials() if record.is_done)
    assert {name for name in SPACE.variants if trained[name] < 3} <= {"transfer"}
    for record in RUN.trials():
        folder = RUN.trial_folder(record.id)
        assert len(RUN.history(record.id)) == round(2 * record.metrics.epochs)
        assert "/" not in (folder / TRIAL_FILE).read_text()


def test_training_accuracy_falls_in_the_second_half_of_an_epoch():
    """Which is why the gap of trials that end on a half epoch and on a whole one does not compare."""
    ends = {"final": [], "final_weight_decay": []}
    for record in RUN.trials():
        if record.variant in ends:
            rows = RUN.history(record.id)
            ends[record.variant].append(len(rows) % 2)
            halves = list(rows["train_accuracy"])[4:]
            assert all(first > second for first, second in zip(halves[::2], halves[1::2], strict=False))
    assert {name: sorted(odd) for name, odd in ends.items()} == {"final": [1, 1, 1], "final_weight_decay": [0, 1, 1]}


def test_losses_are_means_of_all_seeds():
    """Not of those alone that the early stop left: those of model1 end after 5.5 to 8.5 epochs."""
    from harness.reporting import captions, figures

    records = [r for r in RUN.trials() if r.variant == "model1"]
    assert max(r.metrics.epochs for r in records) > 8
    (axis,) = figures.losses(captions.histories_of(RUN, records)).axes
    drawn = [line.get_xdata() for line in axis.lines if len(line.get_xdata())]
    assert {max(epochs) for epochs in drawn} == {round(min(r.metrics.epochs for r in records), 2)}


def test_cached_features_change_no_weights():
    cached = {(r.variant, r.seed): r.weights_sha256 for r in transferred("cached")}
    anew = {(r.variant, r.seed): r.weights_sha256 for r in transferred("uncached")}
    assert anew
    assert anew.items() <= cached.items()


def test_the_space_that_it_shows_is_short_and_one(tmp_path):
    (block,) = blocks()
    assert len(block.splitlines()) <= 15
    (tmp_path / "five.py").write_text(block)
    assert load_space(str(tmp_path / "five.py")).variants


@pytest.mark.parametrize(
    ("space", "run"),
    [("recipe", WARMED), *((str(run.path / "space.py"), run) for run in (NARROWED, PILOT, DECAY))],
    ids=["warmed", "narrowed", "pilot", "decay"],
)
def test_the_spaces_beside_results_are_those_that_were_run(space, run):
    resolved = resolve({"space": space, "trial.precision": "bfloat16", "trial.compile": "kernels"})
    searched = [record for record in run.trials() if record.stage == "search"]
    assert {record.variant for record in searched} == set(resolved.space.variants or [""])
    for record in searched:
        changes = resolved.space.variants.get(record.variant, record.parameters)
        assert merge(resolved.base, nested(dict(changes))).items() >= record.config.items()
        assert record.parameters.keys() <= resolved.space.parameters.keys() | changes.keys()
