"""Every second of a trial is booked, and what stays in a process from trial to trial changes no result."""

import json
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from conftest import TOP, command, records

from harness.config import Data, Trial
from harness.reporting import figures
from harness.run.records import Timing
from harness.training.job import TrainingJob
from harness.training.loop import train_job
from harness.training.timers import KINDS, Timers


def test_every_second_belongs_to_one_kind():
    started = time.perf_counter()
    ledger = Timers("queue", started - 1.5)
    for kind in ("imports", "train", "validate", "train", "idle"):
        ledger.enter(kind)
        time.sleep(0.02)
    timing = Timing()
    ledger.book(timing)
    assert timing.wall_seconds == pytest.approx(1.5 + time.perf_counter() - started, abs=0.005)
    assert sum(timing.ledger.values()) == pytest.approx(timing.wall_seconds)
    assert timing.ledger["queue"] == pytest.approx(1.5, abs=0.01)
    assert timing.ledger["train"] >= 0.04


def test_a_trials_ledger_is_its_wall_time(digits, tmp_path):
    started = time.perf_counter()
    job = TrainingJob(Trial(architecture="model1", epochs=3), digits, folder=tmp_path, read_test=True)
    record = train_job(job, lambda row: time.sleep(0.05))
    wall = time.perf_counter() - started
    timing = record.timing
    assert timing.wall_seconds == pytest.approx(wall, rel=0.01, abs=0.01)
    assert sum(timing.ledger.values()) == pytest.approx(timing.wall_seconds, rel=1e-6)
    assert set(timing.ledger) <= set(KINDS)
    assert timing.ledger["idle"] >= 5 * 0.05
    assert timing.ledger["train"] == pytest.approx(timing.train_seconds)
    assert json.loads((tmp_path / "trial.json").read_text())["timing"] == timing.to_json()


def test_ledgers_of_a_run(small_run):
    run, _ = small_run
    for record in records(run):
        ledger = record.timing.ledger
        assert ("worker start" in ledger) != ("queue" in ledger)  # a new process, or one that stayed
    assert "Where the time of each trial went" in (run / "report" / "index.html").read_text()
    assert (run / "report" / "figures" / "ledger.png").stat().st_size > 10_000


@pytest.mark.parametrize("trials", [3, 60])
def test_ledger_figure(trials):
    rows = [{"trial": f"t{i}", "kind": kind, "seconds": 1.0 + i} for i in range(trials) for kind in KINDS]
    figure = figures.time_breakdown(pd.DataFrame(rows))
    assert figure.axes[0].get_legend() is not None
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len([label for label in labels if label]) == (trials if trials < 30 else 1)


def hundred(dropout: float, number: int) -> dict:
    """The configuration of trial `number`: everything differs that need not be compiled."""
    schedules = ("constant", "linear", "cosine", "one_cycle")
    return {
        "architecture": "baseline",
        "options": {"widths": [32, 64], "hidden": [16], "kernel_size": 3, "dropout": dropout},
        "epochs": 1,
        "batch_size": 16,
        "precision": "float32",
        "optimizer": {"name": "sgd", "lr": 0.01 * (1 + number % 17), "weight_decay": 1e-4 * (number % 7)},
        "schedule": {"name": schedules[number % 4]},
        "label_smoothing": 0.01 * (number % 3),
        "augmentation": {"flip": bool(number % 2)},
    }


def digest(mode: str, number: int) -> list:
    """What trial `number` came to, with the weights in memory."""
    record = train_job(
        TrainingJob(
            Trial(**hundred(0.1 + 0.005 * number, number), compile=mode), Data(name="digits", limit=20), seed=number
        )
    )
    assert record.status == "finished", record
    return [record.metrics.val_loss, record.metrics.train_loss]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "kernels", "default"])
def test_a_hundred_trials_in_one_process(mode, own_cache):
    """No recompilation after the first trial, flat memory, and the bits of a fresh process."""
    process = psutil.Process()
    torch._dynamo.utils.counters.clear()
    results, resident, graphs = [], [], []
    for number in range(100):
        results.append(digest(mode, number))
        resident.append(process.memory_info().rss)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert (graphs[0] > 0) == (mode == "default")
    assert graphs[-1] == graphs[0]
    assert max(resident[10:]) < 1.05 * resident[9]
    for number in (0, 57, 99):
        code = f"import json, test_ledger; print(json.dumps(test_ledger.digest({mode!r}, {number})))"
        paths = f"import sys; sys.path[:0] = [{str(TOP)!r}, {str(TOP / 'tests')!r}]; import torch; "
        threads = f"torch.set_num_threads({torch.get_num_threads()}); "
        fresh = subprocess.run(
            [sys.executable, "-c", paths + threads + code], capture_output=True, text=True, check=True
        )
        assert json.loads(fresh.stdout.splitlines()[-1]) == results[number]


SWEEP = """
from tune_spaces import LogUniform, Space

SPACE = Space(
    trial={"architecture": "model1", "epochs": 1, "precision": "float32", "plan": "rule"},
    data={"name": "digits"},
    search={"samples": 50, "confirm": 0},
    parameters={"optimizer.lr": LogUniform(1e-3, 1e-1)},
)
"""


@pytest.mark.slow
def test_a_sweep_of_short_trials_is_mostly_training(tmp_path):
    """Fifty trials of about a second: of the workers' time after their start at most 15 % is not training."""
    (tmp_path / "sweep.py").write_text(SWEEP)
    done = command("-m", "harness.tune", "space=sweep.py", "run=run", "stages=[search]", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    total: dict[str, float] = {}
    files = {r.id: tmp_path / "run" / "trials" / r.id / "trial.json" for r in records(tmp_path / "run")}
    ends = {name: file.stat().st_mtime for name, file in files.items()}
    for record in records(tmp_path / "run"):
        ledger, wall = record.timing.ledger, record.timing.wall_seconds
        if "queue" in ledger:  # it took from the end of another one in its process until its own
            began = ends[record.id] - wall
            assert min(abs(began - end) for end in ends.values()) <= 0.01 * wall + 0.02  # the writing of two files
        for kind, seconds in ledger.items():
            total[kind] = total.get(kind, 0.0) + seconds
    before = total.pop("worker start")  # until then no trial had started
    share = 1 - (total["train"] + total["validate"]) / sum(total.values())
    assert before > 0
    assert share <= 0.15, (share, total)
