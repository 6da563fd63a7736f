"""search.seeds=auto and benchmark.replicates=auto: more seeds only for what is open, at looks fixed beforehand."""

import json

import numpy as np
import pytest
from conftest import TOP, command, run_record

from benchmarks.looks import Truth, compare_designs
from harness.run.directory import RunDirectory
from harness.run.progress import Progress
from harness.run.records import Metrics, TrialRecord, read_correct, write_trial
from harness.search import runner
from harness.search.resolution import load_space, resolve
from harness.search.stages import search_stage
from harness.search.trials import TrialGenerator
from harness.stats.sequential import SEEDS
from tune_spaces import Claim, Space

VARIANTS = {"base": {}, "better": {"epochs": 2}, "close": {"epochs": 3}, "alone": {"epochs": 4}}
SPACE = Space(
    trial={"architecture": "baseline"},
    data={"name": "digits"},
    variants=VARIANTS,
    claims=[Claim("better is better", "better", "base"), Claim("close is better", "close", "base")],
)
MEANS = {"base": 0.80, "better": 0.90, "close": 0.806, "alone": 0.5}


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """Runs the search stage with trials whose accuracies are made up; returns the seeds of each variant."""
    generator, sizes = np.random.default_rng(0), []

    def made_up(trials, of, _generator, run, _progress, *, scheduler, seconds):
        assert not scheduler
        sizes.append(of)
        for spec in trials[: 0 if seconds == 1.0 else None]:  # out of time
            accuracy = MEANS[spec.variant] + 0.004 * generator.normal()
            metrics = Metrics(test_accuracy=accuracy, train_accuracy=accuracy, val_accuracy=accuracy, val_loss=1.0)
            labels = spec.labels() | {"seed": spec.seed, "config": spec.config.model_dump(mode="json")}
            record = TrialRecord.model_validate(labels | {"status": "finished"})
            record.metrics = metrics
            write_trial(run.trial_folder(spec.id), record)

    monkeypatch.setattr(runner, "run_trials", made_up)

    def started(**search):
        resolved = resolve({"space": "looks", **{f"search.{k}": v for k, v in search.items()}}, SPACE)
        run = RunDirectory(tmp_path / "run")
        if run.configuration() is None:
            run.create(run_record(SPACE), "command")
        search_stage(TrialGenerator(resolved, "fingerprint"), run, Progress())
        assert len(set(sizes)) <= 1 or search["seeds"] != "auto"  # the allocation does not depend on the look
        seeds = {name: sum(r.variant == name for r in run.trials()) for name in VARIANTS}
        return seeds, [(look.seeds, look.claims, look.settled) for look in run.recorded().looks]

    return started


def test_only_open_claims_get_more_seeds(ablation):
    """`better` is settled after three seeds; `alone` is in no claim."""
    seeds, looks = ablation(seeds="auto")
    assert seeds["better"] == seeds["alone"] == 3
    assert seeds["base"] == seeds["close"] > 3
    assert looks[0] == (3, 2, 1)
    assert looks[-1][1:] == (2, 2)  # it ended because nothing was open
    assert ablation(seeds="auto") == (seeds, looks)  # the same command adds nothing


def test_a_fixed_number_is_looked_at_once(ablation):
    seeds, looks = ablation(seeds=4)
    assert (set(seeds.values()), [look[:2] for look in looks]) == ({4}, [(4, 2)])
    assert [look[:2] for look in ablation(seeds=5)[1]] == [(4, 2), (5, 2)]  # which the headline reports


def test_the_time_budget_ends_it(ablation):
    """A look counts only with all its seeds."""
    seeds, looks = ablation(seeds="auto", time_budget_seconds=1e-9)
    assert (set(seeds.values()), looks) == ({0}, [])


@pytest.mark.slow
def test_an_ablation_with_planned_looks(tmp_path):
    """From the command line, with real trials, which keep the test images that they classify correctly."""
    space = TOP / "tests" / "spaces" / "ablation.py"
    done = command(
        "-m", "harness.tune", f"space={space}", "run=run", "search.seeds=auto", "stages=[search,report]", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDirectory(tmp_path / "run")
    looks = run.recorded().looks
    assert [look.seeds for look in looks] == [3, 5, 8, 13, 20][: len(looks)]
    assert all(look.alpha == pytest.approx(0.01) for look in looks)
    for record in run.trials():
        correct = read_correct(run.trial_folder(record.id), record, run.recorded().data.test)
        assert correct.mean() == pytest.approx(record.metrics.test_accuracy)
    assert f"{looks[-1].settled} of 1 claims settled after {looks[-1].seeds} seeds" in done.stdout
    assert "deviation over seeds" in (run.path / "report" / "index.html").read_text()


@pytest.mark.slow
def test_a_benchmark_with_planned_looks(run, tmp_path):
    """It ends at a look, and says what it spent."""
    arguments = ["benchmark.replicates=auto", "benchmark.batch_sizes=[1]", "benchmark.rounds=1"]
    arguments += ["benchmark.runtimes=[onnxruntime]", "benchmark.round_seconds=0.01"]
    done = command("-m", "benchmarks", f"run={run.path}", *arguments, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads((run.path / "verdict.json").read_text())
    assert verdict["alpha"] == pytest.approx(0.0125)
    assert verdict["replicates"] in (5, 8, 13, 20)
    assert verdict["settled"] or verdict["replicates"] == 20


def test_a_plan_is_kept(ablation):
    """A later command for a fixed number is judged by the plan: its seeds count at the plan's looks."""
    _, looks = ablation(seeds="auto", time_budget_seconds=None)
    assert ablation(seeds=SEEDS[-1])[1] == looks


@pytest.mark.slow
def test_planned_looks_save_trials():
    """From the means and deviations of the annealed ablation on CIFAR-10; as docs/evidence.md has it."""
    records = RunDirectory(TOP / "benchmarks" / "results" / "annealed").trials()
    space = load_space("annealed")
    truths = {name: Truth.of([r for r in records if r.variant == name]) for name in space.variants}
    share, planned, fixed = compare_designs(truths, space.claims, 200)
    assert share > 0.9
    assert planned <= 0.7 * fixed
    page = " ".join((TOP / "docs" / "evidence.md").read_text().split())
    found = (
        f"auto settles {share:.2f} of the five claims with {planned:g} trials (median of 200 simulations), and a "
        f"fixed number of seeds that settles as many takes {fixed}, so that auto takes {planned / fixed:.2f} of them"
    )
    assert found in page
