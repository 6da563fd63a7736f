"""Trials that hang, raise, take all memory or do not compile: their siblings finish."""

import time
from pathlib import Path

import psutil
import pytest
from conftest import SMALL_TRIAL, command, records

from harness.run.cache import compiled_folder
from harness.training.job import TrainingJob
from harness.training.loop import train_job

HANGS = """
import time
from architectures.baseline import build as network
def build(num_classes, input_size=32, hang=False):
    net, calls = network(num_classes, input_size=input_size, widths=(8, 16), hidden=(16,)), []
    def hook(*_):
        calls.append(net.training)
        if sum(calls) > 16:  # not in the check of the network
            time.sleep(1e6)
    if hang:
        net.register_forward_hook(hook)
    return net
"""


@pytest.mark.slow
def test_a_hung_trial_is_ended_and_its_siblings_finish(tmp_path):
    (tmp_path / "net.py").write_text(HANGS)
    (tmp_path / "space.py").write_text(
        "from tune_spaces import Space\n"
        "SPACE = Space(trial={'architecture': 'net.py', 'epochs': 2, 'batch_size': 16}, data={'name': 'digits',"
        " 'limit': 20}, variants={'hangs': {'options.hang': True}, 'fine': {}}, search={'seeds': 1})\n"
    )
    arguments = ["-m", "harness.tune", "space=space.py", "run=run", "stages=[search]", "resources.retries=1"]
    started = time.monotonic()
    done = command(*arguments, "resources.timeout_seconds=5", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert time.monotonic() - started < 90
    found = {record.variant: record for record in records(tmp_path / "run")}
    assert found["fine"].status == "finished"
    assert found["hangs"].status == "failed"
    assert found["hangs"].error == "timed out: no validation in 5 s (resources.timeout_seconds)"
    assert "continues from its last checkpoint" in done.stdout  # tried again, once
    text = (tmp_path / "run" / "trials" / found["hangs"].id / "error.txt").read_text()
    assert "net.py" in text


BROKEN = """
import numpy, torch
from architectures.baseline import build as network
held = []
def build(num_classes, input_size=32, fault=""):
    net, calls = network(num_classes, input_size=input_size, widths=(8, 16), hidden=(16,)), []
    def hook(*_):
        calls.append(net.training)
        if sum(calls) < 12:  # the second epoch
            return
        if fault == "raises":
            raise KeyError("no such layer")
        if fault == "host memory":
            torch.empty(10**15)
        if fault == "GPU memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if fault == "all memory":
            for _ in range(64):
                held.append(numpy.ones(2**27))
                __import__("time").sleep(0.2)
    net.register_forward_hook(hook)
    return net
"""


def broken(tmp_path: Path, variants: dict, *more: str, **environment: str):
    """(the command, done; its records by variant) for variants of a network with a fault."""
    (tmp_path / "net.py").write_text(BROKEN)
    (tmp_path / "space.py").write_text(
        "from tune_spaces import Space\n"
        "SPACE = Space(trial={'architecture': 'net.py', 'epochs': 3, 'batch_size': 16, 'checkpoint_seconds': 0},"
        f" data={{'name': 'digits', 'limit': 20}}, variants={variants!r}, search={{'seeds': 1}})\n"
    )
    arguments = ["-m", "harness.tune", "space=space.py", "run=run", "stages=[search]", "resources.cpus_per_trial=1"]
    done = command(*arguments, *more, cwd=tmp_path, **environment)
    return done, {record.variant: record for record in records(tmp_path / "run")}


@pytest.mark.slow
def test_trials_that_break_leave_their_siblings_alone(tmp_path):
    """Exceptions, both memories, losses that are no number: status, reason, retries; and the rest is untouched."""
    faults = ["raises", "host memory", "GPU memory"]
    variants = {"fine": {}, **{fault: {"options.fault": fault} for fault in faults}}
    variants["diverges"] = {"optimizer.lr": 1e20}
    done, found = broken(tmp_path, variants)
    assert done.returncode == 1, done.stdout + done.stderr
    status = {variant: record.status for variant, record in found.items()}
    assert status == {
        "fine": "finished",
        "raises": "failed",
        "host memory": "oom",
        "GPU memory": "oom",
        "diverges": "diverged",
    }
    assert done.stdout.count("KeyError: 'no such layer'; continues from its last checkpoint") == 1
    assert done.stdout.count("continues from its last checkpoint") == len(faults)  # one retry each
    assert f"failed: trial {found['raises'].id}: KeyError: 'no such layer'" in done.stdout
    folder = tmp_path / "run" / "trials" / found["raises"].id
    assert "net.py" in (folder / "error.txt").read_text()
    assert found["raises"].metrics.epochs >= 1.0
    assert "step" in found["diverges"].error
    (tmp_path / "alone").mkdir()
    _, alone = broken(tmp_path / "alone", {"fine": {}})
    assert alone["fine"].metrics == found["fine"].metrics
    assert alone["fine"].weights_sha256 == found["fine"].weights_sha256


@pytest.mark.slow
def test_a_trial_that_takes_all_memory(tmp_path):
    """Ray's monitor ends its process before the system ends another one."""
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + 5 * 2**30) / memory.total
    if share > 0.9:
        pytest.skip("too little memory is free here")
    watched = {"RAY_memory_usage_threshold": f"{share:.3f}", "RAY_memory_monitor_refresh_ms": "50"}
    variants = {"fine": {}, "all memory": {"options.fault": "all memory"}}
    done, found = broken(tmp_path, variants, **watched)
    assert done.returncode == 1, done.stdout + done.stderr
    assert {variant: record.status for variant, record in found.items()} == {
        "fine": "finished",
        "all memory": "oom",
    }


def test_a_compiler_that_fails_once_is_asked_again(digits, tmp_path, monkeypatch):
    """As where what it finds in its cache cannot be loaded; the cache is emptied, and the result is the same."""
    from harness.training import setup

    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    job = TrainingJob(config=SMALL_TRIAL, data=digits, folder=tmp_path / "trial")
    alone = train_job(TrainingJob(config=SMALL_TRIAL, data=digits, folder=tmp_path / "alone"))
    torn = compiled_folder() / "torn"
    torn.touch()
    failing = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    real, calls = setup.make_step, []

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise failing("Failed to import torn.py")
        return real(*arguments)

    monkeypatch.setattr(setup, "make_step", fails_once)
    record = train_job(job)
    assert record.compiled_anew == "InductorError: Failed to import torn.py"
    assert not torn.exists()
    assert (record.metrics, record.weights_sha256) == (alone.metrics, alone.weights_sha256)
    monkeypatch.setattr(setup, "make_step", lambda *_: (_ for _ in ()).throw(failing("always")))
    assert train_job(job).status == "failed"
