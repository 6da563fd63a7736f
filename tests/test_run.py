"""The whole way through the real command: trials, confirmation, export, benchmark, report; continuing; clusters."""

import contextlib
import html.parser
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import SMALL_RUN, SMALL_SPACE, command

from harness import checkpoint, results

ABLATION = str(Path(SMALL_SPACE).parent / "ablation.py")


def records(run: Path) -> list[dict]:
    return results.RunDirectory(run).trials()


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
    assert [(r["stage"], r["status"]) for r in sorted(trials, key=lambda r: r["seed"])] == [
        ("search", "finished")
    ] * 3 + [("confirm", "finished")] * 4
    fingerprint = recorded["data"]["fingerprint"]
    for record in trials:
        folder = run / "trials" / record["id"]
        assert record["id"] == results.trial_id(record["config"], record["seed"], fingerprint)
        assert checkpoint.sha256(folder / "model.safetensors") == record["weights_sha256"]
        history = pd.read_csv(folder / "history.csv")
        assert history["val_accuracy"].max() == record["metrics"]["val_accuracy"]
        assert history["epoch"].iloc[-1] == record["metrics"]["epochs"] == 2

    table = pd.read_csv(run / "trials.csv").set_index("id")
    assert set(table.index) == {r["id"] for r in trials}
    for record in trials:
        assert table.loc[record["id"], "metrics.val_accuracy"] == pytest.approx(record["metrics"]["val_accuracy"])
        assert table.loc[record["id"], "config.optimizer.lr"] == record["config"]["optimizer"]["lr"]


def test_the_test_set_is_read_for_the_confirmed_winner_alone(small_run):
    run, _ = small_run
    read = [r for r in records(run) if "test_accuracy" in r["metrics"]]
    assert len(read) == 2  # the winner's two fresh seeds
    assert {r["stage"] for r in read} == {"confirm"}
    assert len({json.dumps(r["config"]) for r in read}) == 1
    mean = {}
    for record in records(run):
        if record["stage"] == "confirm":
            mean.setdefault(json.dumps(record["config"]), []).append(record["metrics"]["val_accuracy"])
    assert max(mean, key=lambda key: sum(mean[key])) == json.dumps(read[0]["config"])
    exported = json.loads(next((run / "exported").glob("*/manifest.json")).read_text())
    best = max(read, key=lambda r: r["metrics"]["val_accuracy"])
    assert exported["id"] == best["id"]
    assert exported["torch_accuracy"] == pytest.approx(best["metrics"]["test_accuracy"])
    assert sum(map(sum, exported["confusion"])) == exported["files"]["model.onnx"]["parity"]["images"]


def test_inference_rounds_and_summary_agree(small_run):
    run, _ = small_run
    rounds, summary = pd.read_csv(run / "inference.csv"), pd.read_csv(run / "inference_summary.csv")
    names = "artifact backend precision device batch_size threads scope replicate round images seconds"
    assert list(rounds.columns) == names.split()
    measured = summary.dropna(subset=["ratio"])
    assert len(measured) == 2 * 3  # two batch sizes; two runtimes and the reference again
    for row in measured.itertuples():
        own = rounds[(rounds.backend == row.backend) & (rounds.batch_size == row.batch_size)]
        assert len(own) == 3
        assert row.images_per_second == pytest.approx((own.images / own.seconds).median())
        assert row.ratio_low <= row.ratio <= row.ratio_high


class Page(html.parser.HTMLParser):
    """Collects images and visible text; outside references would break `self-contained`."""

    def __init__(self, text: str):
        super().__init__()
        self.images: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"])
        self.outside += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]

    def handle_data(self, data):
        self.text += data


def test_report_is_one_self_contained_page(small_run):
    run, _ = small_run
    page = Page((run / "report" / "index.html").read_text())
    assert page.outside == []
    figures = {p.stem for p in (run / "report" / "figures").glob("*.png")}
    assert figures == {
        "validation_curves",
        "parallel_parameters",
        "accuracy_throughput",
        "latency",
        "accuracy_by_class",
    }
    assert len(page.images) == len(figures)
    for record in records(run):
        assert record["id"] in page.text
    assert "is best: val_accuracy" in page.text
    assert "onnxruntime" in page.text


def test_texts_from_outside_are_inert_in_the_report(small_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(small_run[0], run)
    path = next((run / "trials").glob("*/trial.json"))
    record = json.loads(path.read_text())
    record |= {"status": "failed", "error": "<script>alert(1)</script>"}
    path.write_text(json.dumps(record))
    done = command("-m", "harness.report", f"run={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (run / "report" / "index.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text


def test_lines_in_a_pipe_are_plain(small_run):
    _, output = small_run
    assert "\x1b" not in output
    assert output.count(": started") == 7
    assert output.count(": finished, validation") == 7
    assert "best: " in output


def test_the_same_command_runs_only_what_is_missing(small_run):
    run, _ = small_run
    before, digests = written(run), {p: checkpoint.sha256(p) for p in run.glob("exported/*/*")}
    started = time.perf_counter()
    again = command(*SMALL_RUN, cwd=run.parent)
    assert again.returncode == 0, again.stderr
    assert written(run) == before
    assert {p: checkpoint.sha256(p) for p in run.glob("exported/*/*")} == digests
    assert "0 trials to run, 3 done before" in again.stdout
    assert "benchmark: is there" in again.stdout
    assert time.perf_counter() - started < 60

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


def test_other_data_under_the_same_run_is_refused(small_run):
    run, _ = small_run
    done = command(*SMALL_RUN, "data.limit=30", cwd=run.parent)
    assert done.returncode == 2
    assert "holds another space, other trial.* or other data.* values" in done.stderr
    done = command(*SMALL_RUN, "trial.epochs=3", cwd=run.parent)
    assert done.returncode == 2


def test_two_drivers_at_once(small_run):
    run, _ = small_run
    with results.RunDirectory(run).locked():
        done = command(*SMALL_RUN, cwd=run.parent)
    assert done.returncode == 2
    assert "another process works on it" in done.stderr


def test_dry_run_writes_nothing(tmp_path):
    done = command("-m", "harness.tune", f"space={SMALL_SPACE}", "dry_run=true", cwd=tmp_path)
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
        "        if len(x) > 1: raise RuntimeError('boom in the layer')\n"
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
    status = {(r["variant"], r["seed"]): r["status"] for r in trials}
    assert [status[v, s] for v in ("relu", "mish") for s in (0, 1)] == ["finished"] * 4
    assert [status["broken", s] for s in (0, 1)] == ["failed"] * 2
    assert all("test_accuracy" in r["metrics"] for r in trials if r["status"] == "finished")
    net.write_text(net.read_text().replace("raise RuntimeError('boom in the layer')", "pass"))
    failed = next(r for r in trials if r["status"] == "failed")
    assert "boom" in (tmp_path / "run" / "trials" / failed["id"] / "error.txt").read_text()
    assert (tmp_path / "run" / "report" / "figures" / "effects.png").is_file()
    assert "boom in the layer" in (tmp_path / "run" / "report" / "index.html").read_text()
    mended = command("-m", "harness.tune", f"space={space}", "run=run", "stages=[search]", cwd=tmp_path)
    assert mended.returncode == 0, mended.stdout
    assert "2 trials to run, 4 done before" in mended.stdout
    assert not list((tmp_path / "run").glob("trials/*/error.txt"))


LONGER = ["trial.epochs=6", "data.limit=none", "trial.validations_per_epoch=4", "search.samples=4"]


@pytest.mark.slow
def test_killed_half_way_the_same_command_finishes_the_rest(tmp_path):
    arguments = [*SMALL_RUN, *LONGER, "stages=[search]"]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run = tmp_path / "run"
    deadline = time.monotonic() + 240
    while len(list(run.glob("trials/*/trial.json"))) < 1:
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {str(p): (p.stat().st_mtime_ns, p.read_text()) for p in run.glob("trials/*/trial.json")}
    assert 1 <= len(finished) < 4
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{4 - len(finished)} trials to run, {len(finished)} done before" in done.stdout
    for path, before in finished.items():
        assert (Path(path).stat().st_mtime_ns, Path(path).read_text()) == before
    assert [r["status"] for r in records(run)] == ["finished"] * 4

    untouched = tmp_path / "untouched"
    untouched.mkdir()
    assert command(*arguments, cwd=untouched).returncode == 0
    equal = [
        {r["id"]: (r["metrics"], r["weights_sha256"]) for r in records(folder)} for folder in (run, untouched / "run")
    ]
    assert equal[0] == equal[1]


@pytest.mark.slow
def test_optuna_and_asha_stop_trials_and_say_so(tmp_path):
    arguments = [*SMALL_RUN, "search.algorithm=optuna", "search.scheduler=asha", "trial.epochs=4", "search.samples=6"]
    done = command(*arguments, "stages=[search,confirm,report]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = [r for r in records(tmp_path / "run") if r["stage"] == "search"]
    assert sorted(r["index"] for r in trials) == list(range(6))
    assert next(r for r in trials if r["index"] == 0)["parameters"] == {}
    stopped = [r for r in trials if r["status"] == "stopped"]
    assert stopped
    assert all(r["stop_reason"] == "asha" and r["metrics"]["epochs"] < 4 for r in stopped)
    assert "stopped by asha" in (tmp_path / "run" / "report" / "index.html").read_text()
    arguments[-1] = "search.samples=7"
    more = command(*arguments, "stages=[search]", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "1 samples to run with Optuna, 6 done before" in more.stdout
    drawn = [json.dumps(r["parameters"]) for r in records(tmp_path / "run") if r["stage"] == "search"]
    assert len(set(drawn)) == 7


@pytest.mark.slow
def test_time_budget_ends_in_good_order(tmp_path):
    arguments = [*SMALL_RUN, "trial.epochs=500", "search.time_budget_seconds=12", "stages=[search]"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = records(tmp_path / "run")
    assert trials
    assert {(r["status"], r["stop_reason"]) for r in trials} == {("stopped", "time budget")}
    assert all(r["metrics"]["epochs"] > 0 and r["metrics"]["val_accuracy"] > 0 for r in trials)
    assert all(r["environment"]["threads"] >= 1 and r["timing"]["wall_seconds"] > 0 for r in trials)


@pytest.mark.slow
def test_sigterm_and_sigint_end_with_their_codes(tmp_path):
    for number, (sent, code) in enumerate(((signal.SIGTERM, 143), (signal.SIGINT, 130))):
        process = subprocess.Popen(
            [sys.executable, *SMALL_RUN, "trial.epochs=500", f"search.seed={number}", "stages=[search]"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        while "started" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(sent)
        started = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert time.monotonic() - started < 15
        assert "the same command continues" in errors


@pytest.mark.slow
def test_cluster_of_two_nodes(tmp_path):
    """Two nodes of one CPU each: four trials run on both, two at a time."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            arguments = [*SMALL_RUN, "search.samples=4", f"resources.address={cluster.address}"]
            done = command(*arguments, "stages=[search]", cwd=tmp_path)
            assert done.returncode == 0, done.stdout + done.stderr
            arguments.remove("run=run")
            wrong = command(*arguments, "resources.cpus_per_trial=2", "run=other", cwd=tmp_path)
            assert wrong.returncode == 2
            assert "no node that fits has more than 1 CPUs" in wrong.stderr
            assert not (tmp_path / "other").exists()
        finally:
            cluster.shutdown()
    trials = records(tmp_path / "run")
    assert [r["status"] for r in trials] == ["finished"] * 4
    assert {r["environment"]["threads"] for r in trials} == {1}


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again(tmp_path):
    import psutil

    arguments = [*SMALL_RUN, *LONGER, "stages=[search]", "resources.concurrency=1", "resources.cpus_per_trial=1"]
    process = subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    run, killed, deadline = tmp_path / "run", False, time.monotonic() + 120
    while not killed:
        assert process.poll() is None
        assert time.monotonic() < deadline
        running = [p.parent for p in run.glob("trials/*/history.csv") if not (p.parent / "trial.json").exists()]
        assert len(running) <= 1  # resources.concurrency
        for child in psutil.Process(process.pid).children(recursive=True) if running else []:
            with contextlib.suppress(psutil.Error):  # processes come and go
                if " ".join(child.cmdline()).startswith("ray::Worker"):
                    child.kill()
                    killed = True
        time.sleep(0.05)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "its process died; started again" in output, output
    assert [r["status"] for r in records(run)] == ["finished"] * 4


@pytest.mark.slow
def test_a_trial_that_always_kills_its_worker_fails_with_the_reason(tmp_path):
    (tmp_path / "net.py").write_text(
        "import os, signal\n"
        "from architectures.baseline import build as network\n"
        "def build(num_classes, input_size=32):\n"
        "    if 'RAY_JOB_ID' in os.environ or 'default_worker' in ' '.join(__import__('sys').argv):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return network(num_classes, input_size=input_size)\n"
    )
    arguments = [*SMALL_RUN, "trial.architecture=net.py", "search.samples=1", "stages=[search]", "resources.retries=0"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    (record,) = records(tmp_path / "run")
    assert record["status"] == "failed"
    assert "died" in record["error"]
    assert (tmp_path / "run" / "trials" / record["id"] / "error.txt").read_text()
