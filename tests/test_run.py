"""The whole way through the real command: trials, confirmation, export, benchmark, report; continuing; clusters."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import SMALL_RUN, SMALL_SPACE, TOP, command, here, records

from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.provenance import trial_id
from harness.run.records import WEIGHTS_FILE

ABLATION = str(Path(SMALL_SPACE).parent / "ablation.py")


def written(run: Path) -> dict[str, int]:
    return {str(p.relative_to(run)): p.stat().st_mtime_ns for p in run.glob("trials/*/*")}


def test_every_file_is_there_and_agrees(small_run):
    run, _ = small_run
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["data"]["classes"] == list("0123456789")
    assert recorded["config"]["search"]["samples"] == 3
    assert len(recorded["commands"]) >= 1
    assert "trial" in (run / "run.log").read_text()

    trials = records(run)
    assert [(r.stage, r.status) for r in sorted(trials, key=lambda r: r.seed)] == [("search", "finished")] * 3 + [
        ("confirm", "finished")
    ] * 4
    fingerprint = recorded["data"]["fingerprint"]
    for record in trials:
        folder = run / "trials" / record.id
        assert record.id == trial_id(record.config, record.seed, fingerprint)
        assert storage.sha256(folder / "model.safetensors") == record.weights_sha256
        history = pd.read_csv(folder / "history.csv")
        assert history["val_accuracy"].max() == record.metrics.val_accuracy
        assert history["epoch"].iloc[-1] == record.metrics.epochs == 2

    table = pd.read_csv(run / "trials.csv").set_index("id")
    assert set(table.index) == {r.id for r in trials}
    for record in trials:
        assert table.loc[record.id, "metrics.val_accuracy"] == pytest.approx(record.metrics.val_accuracy)
        assert table.loc[record.id, "trial.optimizer.lr"] == record.config["optimizer"]["lr"]


def test_the_test_set_is_read_for_the_confirmed_winner_alone(small_run):
    run, _ = small_run
    read = [r for r in records(run) if r.metrics.test_accuracy is not None]
    assert len(read) == 2  # the winner's two fresh seeds
    assert {r.stage for r in read} == {"confirm"}
    assert len({json.dumps(r.config) for r in read}) == 1
    mean = {}
    for record in records(run):
        if record.stage == "confirm":
            mean.setdefault(json.dumps(record.config), []).append(record.metrics.val_accuracy)
    assert max(mean, key=lambda key: sum(mean[key])) == json.dumps(read[0].config)
    exported = json.loads(next((run / "exported").glob("*/manifest.json")).read_text())
    best = max(read, key=lambda r: r.metrics.val_accuracy)
    assert exported["id"] == best.id
    assert exported["torch_accuracy"] == pytest.approx(best.metrics.test_accuracy)
    assert sum(map(sum, exported["confusion"])) == exported["files"]["model.onnx"]["parity"]["images"]


def test_inference_rounds_and_summary_agree(small_run):
    run, _ = small_run
    rounds, summary = pd.read_csv(run / "inference.csv"), pd.read_csv(run / "inference_summary.csv")
    names = "artifact backend precision device batch_size threads scope replicate round images seconds"
    assert list(rounds.columns) == [*names.split(), "call_ms", "event_ms", "foreign_cores", "note"]
    measured = summary.dropna(subset=["ratio"])
    files = json.loads(next((run / "exported").glob("*/manifest.json")).read_text())["files"].values()
    outcomes = {f["precision"]: f["parity"]["outcome"] for f in files if "parity" in f}
    assert outcomes == {"float32": "passes", "int8": "too few images"}  # which is timed all the same
    served = [f for f in files if f["input"]["normalized"]]
    assert len(served) >= 3
    assert len(measured) == 2 * (len(served) + 1)  # two batch sizes; each file, and the reference again
    for row in measured.itertuples():
        own = rounds[(rounds.backend == row.backend) & (rounds.batch_size == row.batch_size)]
        assert len(own) == 2 * 2  # replicates and rounds
        assert row.images_per_second == pytest.approx((own.images / own.seconds).median())
        assert row.ratio_low <= row.ratio <= row.ratio_high


def test_lines_in_a_pipe_are_plain(small_run):
    _, output = small_run
    assert "\x1b" not in output
    assert output.count(": started") == 7
    assert output.count(": finished, validation") == 7
    assert "best: " in output


@pytest.mark.slow
def test_the_same_command_runs_only_what_is_missing(small_run):
    run, _ = small_run
    before, digests = written(run), {p: storage.sha256(p) for p in run.glob("exported/*/**/*") if p.is_file()}
    again = command(*SMALL_RUN, cwd=run.parent)
    assert again.returncode == 0, again.stderr
    assert written(run) == before
    assert {p: storage.sha256(p) for p in run.glob("exported/*/**/*") if p.is_file()} == digests
    assert "0 trials to run, 3 done before" in again.stdout
    assert "benchmark: is already complete" in again.stdout

    lost = next((run / "trials").glob("*"))
    record = json.loads((lost / "trial.json").read_text())
    for file in lost.iterdir():
        file.unlink()
    more = command(*SMALL_RUN, "stages=[search,confirm]", cwd=run.parent)
    assert more.returncode == 0, more.stderr
    after = json.loads((lost / "trial.json").read_text())
    for r in (record, after):  # test metrics are read later, and for the winner alone
        r["metrics"] = {k: v for k, v in r["metrics"].items() if not k.startswith("test")}
    assert after["metrics"] == record["metrics"]
    assert after["weights_sha256"] == record["weights_sha256"]
    others = {k: v for k, v in written(run).items() if lost.name not in k and not k.endswith("trial.json")}
    assert others == {k: before[k] for k in others}


def test_records_of_another_version_are_left_alone(small_run, tmp_path):
    """They are intact: what this version cannot read, it neither ignores nor removes."""
    run = tmp_path / "run"
    shutil.copytree(small_run[0], run)
    for file, changes in (
        (next(run.glob("trials/*/trial.json")), {"status": "paused"}),
        (run / "run.json", {"data": 1}),
    ):
        storage.write_json(file, storage.read_json(file) | changes)
        before = written(run)
        for arguments in (SMALL_RUN, ("-m", "harness.report", "run=run")):
            done = command(*arguments, cwd=tmp_path)
            assert done.returncode == 2, done.stdout + done.stderr
            assert f"{file}: another version of this project wrote it ({next(iter(changes))}: " in done.stderr
        assert written(run) == before


@pytest.mark.slow
def test_results_go_on_without_their_weights(small_run, tmp_path):
    """Trials and their table alone, as results are passed on: nothing runs again, but what needs weights says so."""
    weights = shutil.ignore_patterns(WEIGHTS_FILE)
    shutil.copytree(small_run[0] / "trials", tmp_path / "run" / "trials", ignore=weights)
    shutil.copy(small_run[0] / "trials.csv", tmp_path / "run")
    before = written(tmp_path / "run")
    done = command(*SMALL_RUN, "stages=[search,confirm,report]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("0 trials to run") == 2
    assert written(tmp_path / "run") == before
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    done = command(*SMALL_RUN, "stages=[export]", cwd=tmp_path)
    assert done.returncode == 1
    assert "the weights are missing; remove" in done.stdout


@pytest.mark.slow
def test_a_variant_that_changed_is_refused(tmp_path):
    """Its earlier trials are another variant's; and trials of other images are none of this run's."""
    space = tmp_path / "space.py"
    space.write_text(Path(ABLATION).read_text())
    chosen = ["search.variants=[mish]", "search.seeds=1", "stages=[search]"]
    arguments = ["-m", "harness.tune", f"space={space}", "run=run", *chosen]
    assert command(*arguments, cwd=tmp_path).returncode == 0
    before = written(tmp_path / "run")
    space.write_text(space.read_text().replace('"options.activation": "mish"', '"options.activation": "silu"'))
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert "variant mish or the base was changed since trial" in done.stderr
    for name in ("run.json", "run.copy.json"):
        (tmp_path / "run" / name).unlink()
    for path in (tmp_path / "run").iterdir():
        if path.name != "trials":
            path.unlink()
    done = command(*arguments, "data.limit=30", cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert "is of other images" in done.stderr
    assert written(tmp_path / "run") == before


def test_other_data_under_the_same_run_is_refused(small_run):
    run, _ = small_run
    done = command(*SMALL_RUN, "data.limit=30", cwd=run.parent)
    assert done.returncode == 2
    assert "was begun with data.limit=40; give the same, or run=NEW" in done.stderr
    done = command(*SMALL_RUN, "trial.epochs=3", cwd=run.parent)
    assert done.returncode == 2


@pytest.mark.slow
def test_trials_of_other_code_are_refused_unless_accepted(tmp_path):
    net = tmp_path / "net.py"
    net.write_text((TOP / "architectures" / "baseline.py").read_text())
    arguments = [*SMALL_RUN, f"trial.architecture={net}", "search.samples=1", "stages=[search]"]
    assert command(*arguments, cwd=tmp_path).returncode == 0
    (before,) = records(tmp_path / "run")
    net.write_text(net.read_text() + "\n\nCHANGED = True\n")
    arguments[-2] = "search.samples=2"
    refused = command(*arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert f"user/net.py changed since trials {before.id} were trained" in refused.stderr
    assert records(tmp_path / "run") == [before]
    accepted = command(*arguments, "other_code=true", cwd=tmp_path)
    assert accepted.returncode == 0, accepted.stderr
    after = records(tmp_path / "run")
    assert before in after
    assert len({r.environment.code for r in after}) == 2


def test_two_drivers_at_once(small_run):
    run, _ = small_run
    with RunDirectory(run).locked():
        done = command(*SMALL_RUN, cwd=run.parent)
    assert done.returncode == 2
    assert f"process {os.getpid()} on host" in done.stderr


def test_dry_run_writes_nothing(tmp_path):
    done = here("harness.tune", f"space={SMALL_SPACE}", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "search: 3 trials to run; confirm: 4" in done.stdout
    assert "images/s" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ablation_with_a_failing_variant(tmp_path):
    (tmp_path / "space.py").write_text(
        Path(ABLATION).read_text().replace('"mish": {', '"broken": {"architecture": "BROKEN"}, "mish": {')
    )
    net = tmp_path / "net.py"  # fails in training alone, so that it passes the checks before
    net.write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        self.calls = getattr(self, 'calls', 0) + self.training\n"
        "        if self.calls > 5: raise RuntimeError('boom in the layer')\n"
        "        return super().forward(x.flatten(1))\n"
        "def build(num_classes):\n"
        "    return Net(3072, num_classes)\n"
    )
    space = tmp_path / "space.py"
    space.write_text(space.read_text().replace("BROKEN", str(net)))
    done = command("-m", "harness.tune", f"space={space}", "run=run", "stages=[search,confirm,report]", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("RuntimeError: boom in the layer") >= 2
    trials = records(tmp_path / "run")
    status = {(r.variant, r.seed): r.status for r in trials}
    assert [status[v, s] for v in ("relu", "mish") for s in (0, 1)] == ["finished"] * 4
    assert [status["broken", s] for s in (0, 1)] == ["failed"] * 2
    assert all(r.metrics.test_accuracy is not None for r in trials if r.status == "finished")
    net.write_text(net.read_text().replace("raise RuntimeError('boom in the layer')", "pass"))
    failed = next(r for r in trials if r.status == "failed")
    assert "boom" in (tmp_path / "run" / "trials" / failed.id / "error.txt").read_text()
    assert (tmp_path / "run" / "report" / "figures" / "effects.png").is_file()
    assert "boom in the layer" in (tmp_path / "run" / "report" / "index.html").read_text()
    mended = command("-m", "harness.tune", f"space={space}", "run=run", "stages=[search]", cwd=tmp_path)
    assert mended.returncode == 0, mended.stdout
    assert "2 trials to run, 4 done before" in mended.stdout
    assert not list((tmp_path / "run").glob("trials/*/error.txt"))
