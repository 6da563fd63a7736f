"""What a trial is given of a machine or a cluster; what a search knows when it goes on."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
from conftest import TOP

from harness.config import BadInput, Resources, Search
from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.records import HISTORY_FILE, TRIAL_FILE, TrialRecord, write_history, write_trial
from harness.search.allocation import Allocation
from harness.search.searchers import OptunaSamples
from harness.search.trials import TrialGenerator
from tune_spaces import Choice, Uniform


def share(nodes, trials, **resources):
    found = Allocation.of(Resources(**resources), nodes, trials)
    return found.request["cpu"], found.request["gpu"], found.threads


@pytest.mark.parametrize(
    ("nodes", "trials", "resources", "expected"),
    [
        ([{"CPU": 2}], 8, {}, (1, 0, 1)),
        ([{"CPU": 2}], 1, {}, (2, 0, 2)),
        ([{"CPU": 16}], 4, {}, (4, 0, 4)),
        ([{"CPU": 1}, {"CPU": 1}], 1, {}, (1, 0, 1)),  # no node has two
        ([{"CPU": 16, "GPU": 4}], 8, {}, (4, 1, 4)),
        ([{"CPU": 16, "GPU": 1}], 8, {"gpus_per_trial": 0.25}, (4, 0.25, 4)),
        ([{"CPU": 16, "GPU": 1}], 8, {"gpus_per_trial": 0}, (2, 0, 2)),
        ([{"CPU": 64}, {"CPU": 4, "GPU": 1}], 1, {}, (4, 1, 4)),  # the head has CPUs, the other one the GPU
        ([{"CPU": 8}], 8, {"concurrency": 2}, (4, 0, 4)),
        ([{"CPU": 8}], 8, {"cpus_per_trial": 3}, (3, 0, 3)),
    ],
)
def test_share(nodes, trials, resources, expected):
    assert share(nodes, trials, **resources) == expected


@pytest.mark.parametrize(
    "resources", [{"cpus_per_trial": 9}, {"gpus_per_trial": 1}, {"gpus_per_trial": 0.5, "cpus_per_trial": 5}]
)
def test_more_than_any_node_has(resources):
    with pytest.raises(BadInput, match="ask for less"):
        share([{"CPU": 8}, {"CPU": 4, "GPU": 0.5}], 2, **resources)


def test_gpus_that_the_cluster_does_not_offer_are_told(monkeypatch):
    """NVML fails on a node, say, and Ray sees no GPU where PyTorch does: not a search on the CPU without a word."""
    monkeypatch.setattr("harness.search.allocation.usable", lambda: 2)
    with pytest.raises(BadInput, match="no node of the cluster offers a GPU, but PyTorch sees 2 here"):
        share([{"CPU": 8}], 2)
    assert share([{"CPU": 8}], 2, gpus_per_trial=0) == (4, 0, 4)


def ended(run, name, status, accuracies, stage="search"):
    folder = run.trial_folder(name)
    rows = [
        {"epoch": float(epoch), "step": epoch, "val_accuracy": value, "val_loss": 1 - value}
        for epoch, value in enumerate(accuracies, 1)
    ]
    write_history(folder, rows)
    record = TrialRecord(id=name, stage=stage, status=status, stop_reason="asha", seed=0, config={})
    write_trial(folder, record)


def test_early_stopping_knows_what_was_before(tmp_path):
    """Rungs at 1 and 2 epochs are as they were after these trials; confirmations are none of them."""
    from harness.search.searchers import make_scheduler

    run = RunDirectory(tmp_path)
    ended(run, "a", "finished", [0.5, 0.6, 0.7])
    ended(run, "b", "stopped", [0.2])
    ended(run, "c", "finished", [0.9, 0.9, 0.9], stage="confirm")
    (run.trial_folder("b") / "other.csv").touch()
    scheduler = make_scheduler(Search(scheduler="asha"), 4, run)
    (bracket,) = scheduler._brackets
    assert dict(bracket._rungs) == {
        1: {"a": 0.5, "b": 0.2},
        2: {"a": 0.6},
        4: {},
    }
    loss = make_scheduler(Search(scheduler="asha", metric="val_loss"), 4, run)._brackets[0]
    assert dict(loss._rungs)[1] == {"a": -0.5, "b": -0.8}
    (run.trial_folder("a") / HISTORY_FILE).unlink()
    assert dict(make_scheduler(Search(scheduler="asha"), 4, run)._brackets[0]._rungs)[2] == {}


def test_what_another_stage_left_stays(tmp_path):
    """A search that goes on does not touch the checkpoints of a confirmation that was interrupted."""
    run = RunDirectory(tmp_path)
    ended(run, "done", "finished", [0.5])
    ended(run, "failed", "failed", [0.5])
    for name in ("mine", "others"):
        storage.write_atomically(run.trial_folder(name) / f"checkpoint-00000001-{'0' * 32}.safetensors", b"")
        storage.write_atomically(run.trial_folder(name) / "rest.txt", b"")
    run.remove(lambda record: record.status == "failed", continued={"mine", "failed"})
    left = {path.parent.name: path.name for path in tmp_path.glob("trials/*/*") if path.name.startswith(("c", "r"))}
    assert set(left) == {"mine", "others"}
    assert not (run.trial_folder("mine") / "rest.txt").exists()
    assert (run.trial_folder("others") / "rest.txt").exists()
    assert not (run.trial_folder("failed") / TRIAL_FILE).exists()
    assert (run.trial_folder("done") / TRIAL_FILE).exists()
    run.remove(lambda record: False)
    assert [path.name for path in (tmp_path / "trials").iterdir()] == ["done"]


def test_the_private_parts_of_ray_are_there():
    """Those of harness/search/ray_internals.py, the only module that uses any."""
    import ast

    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.tune import ResultGrid

    from harness.search import ray_internals
    from harness.search.searchers import InOrder, OptunaSamples

    assert RayActorManager._actor_task_failed is ray_internals._fail_alone
    assert callable(ray_internals._task_failed)
    (bracket,) = ray_internals.brackets_of(ray_internals.AsyncHyperBandScheduler(time_attr="epoch"))
    assert callable(bracket.on_result)
    assert not ray_internals.has_suggested(OptunaSamples([], dict, {}, metric="val_loss", mode="min"), "a")
    assert "_experiment_analysis" in ResultGrid.__init__.__code__.co_names
    assert InOrder(iter([]), metric="val_loss", mode="min").suggest("a") == InOrder.FINISHED
    assert {"ENABLE_RAY_CLUSTER"} <= set(vars(ray_internals.ray_constants))
    assert any(name.startswith("AWS_") for name in ray_internals.class_cache.ENV_VARS_TO_PROPAGATE)
    private = {"_brackets", "_ot_trials", "_experiment_analysis", "_actor_task_failed"}
    for path in (TOP / "harness" / "search").glob("*.py"):
        used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert path.name == "ray_internals.py" or not used & private


def test_what_runs_in_a_worker_finds_the_files_and_modules_of_the_driver(tmp_path, monkeypatch):
    """Last, so that nothing there hides a package of this project."""
    from harness.search.worker import call_with_paths, own_paths

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    paths = own_paths() | {"imports": [str(tmp_path), *own_paths()["imports"]]}
    monkeypatch.chdir("/")
    found = call_with_paths(paths, lambda name: {"file": Path(name).exists(), "last": sys.path[-1]}, "file")
    assert found == {"file": True, "last": str(tmp_path)}


def test_samples_of_optuna_are_not_drawn_beforehand(tmp_path, monkeypatch, capsys):
    def unwanted(_):
        raise AssertionError("drawn")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrialGenerator, "search_trials", unwanted)
    monkeypatch.setattr(sys, "argv", ["harness.tune", "space=quick", "search.algorithm=optuna", "dry_run=true"])
    assert importlib.import_module("harness.tune").main() == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        [(8, 8, 8), (16, 16)],
        [((8,), (8, 8)), ((4,), (4, 4))],
        [{"widths": (8, 8)}, {"widths": (4,)}],
        [None, (1,), "x"],
        [0.1, (0.1,)],
    ],
)
def test_optuna_goes_on_from_values_as_records_hold_them(values):
    """JSON makes lists of tuples."""
    domain = Choice(values)
    recorded = json.loads(json.dumps(domain.draw(random.Random(0))))
    parameters = {"options.x": domain, "optimizer.lr": Uniform(0.0, 1.0)}
    searcher = OptunaSamples([2], lambda found, _: found, parameters, metric="val_accuracy", mode="max", seed=0)
    searcher.add_result({"options.x": recorded, "optimizer.lr": 0.5}, 0.5)
    assert len(searcher._ot_study.trials) == 1
    searcher.add_result({"options.x": "no longer there", "optimizer.lr": 0.5}, 0.5)
    searcher.add_result({"options.x": recorded, "optimizer.lr": 2.5}, 0.5)
    assert len(searcher._ot_study.trials) == 1
    suggested = searcher.suggest("a")
    assert suggested["options.x"] in domain.values
    assert 0 <= suggested["optimizer.lr"] <= 1
