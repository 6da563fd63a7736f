"""Runs that are stopped, killed or cut short, and a cluster: whole commands, so all of them are slow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL_RUN, command, records

from benchmarks.sweeps import training_workers

pytestmark = pytest.mark.slow

LONGER = ["trial.epochs=12", "data.limit=none", "trial.validations_per_epoch=4", "search.samples=4"]
LONGER += ["trial.checkpoint_seconds=0"]


def early_checkpoints(run):
    """Of trials that have most of their epochs before them: no other will have ended when the signal arrives."""
    return list(run.glob("trials/*/checkpoint-0000000[12]-*"))


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
    while not (any(run.glob("trials/*/trial.json")) and early_checkpoints(run)):
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
    assert [r.status for r in records(run)] == ["finished"] * 4
    assert any(r.continued for r in records(run))
    assert not any(run.glob("trials/*/checkpoint-*"))

    untouched = tmp_path / "untouched"
    untouched.mkdir()
    assert command(*arguments, cwd=untouched).returncode == 0
    equal = [{r.id: (r.metrics, r.weights_sha256) for r in records(folder)} for folder in (run, untouched / "run")]
    assert equal[0] == equal[1]


def test_optuna_and_asha_stop_trials_and_say_so(tmp_path):
    arguments = [*SMALL_RUN, "search.algorithm=optuna", "search.scheduler=asha", "trial.epochs=4", "search.samples=6"]
    done = command(*arguments, "stages=[search,confirm,report]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = [r for r in records(tmp_path / "run") if r.stage == "search"]
    assert sorted(r.index for r in trials) == list(range(6))
    assert next(r for r in trials if r.index == 0).parameters == {}
    stopped = [r for r in trials if r.status == "stopped"]
    assert stopped
    assert all(r.stop_reason == "asha" and r.metrics.epochs < 4 for r in stopped)
    assert "stopped by asha" in (tmp_path / "run" / "report" / "index.html").read_text()
    arguments[-1] = "search.samples=7"
    more = command(*arguments, "stages=[search]", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "1 samples to run with Optuna, 6 done before" in more.stdout
    drawn = [json.dumps(r.parameters) for r in records(tmp_path / "run") if r.stage == "search"]
    assert len(set(drawn)) == 7


def test_time_budget_ends_in_good_order(tmp_path):
    arguments = [*SMALL_RUN, "trial.epochs=500", "search.time_budget_seconds=12", "stages=[search]"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = records(tmp_path / "run")
    assert trials
    assert {(r.status, r.stop_reason) for r in trials} == {("stopped", "time budget")}
    assert all(r.metrics.epochs > 0 and r.metrics.val_accuracy > 0 for r in trials)
    assert all(r.environment.threads >= 1 and r.timing.wall_seconds > 0 for r in trials)


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
        assert "run the same command again to continue" in errors


NATIVE = """
import hashlib
print("in native code", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # takes minutes, and no handler of signals runs in between
"""


def test_sigterm_ends_native_code_in_time(tmp_path):
    (tmp_path / "space.py").write_text(NATIVE)
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.tune", "space=space.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in native code\n"
    time.sleep(1)
    process.terminate()
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "stopped; run the same command again to continue\n")
    assert time.monotonic() - started < 15


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
    assert [r.status for r in trials] == ["finished"] * 4
    assert {r.environment.threads for r in trials} == {1}


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
        ready = bool(early_checkpoints(run))
        for worker in training_workers(psutil.Process(process.pid).children(recursive=True)) if ready else []:
            worker.kill()
            killed = True
        time.sleep(0.05)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "its process died; continues from its last checkpoint" in output, output
    assert [r.status for r in records(run)] == ["finished"] * 4
    assert any(r.continued for r in records(run))


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
    assert record.status == "failed"
    assert "died" in record.error
    assert (tmp_path / "run" / "trials" / record.id / "error.txt").read_text()
