"""Processes, nodes and drivers that are killed, stopped, drained or cut off: a sweep ends as if left alone."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import SMALL_TRIAL, TOP, command

from benchmarks import sweeps
from harness.run import checkpoints, storage
from harness.run.directory import OWNER, RunDirectory
from harness.training.job import TrainingJob
from harness.training.loop import train_job, training_loop


def test_no_clock_decides_which_checkpoint_is_newest(tmp_path, digits):
    job = TrainingJob(config=SMALL_TRIAL, data=digits, folder=tmp_path)

    loop = training_loop(job)
    for row, _ in loop:
        if row["epoch"] >= 2:
            loop.close()
            break
    _, oldest = checkpoints.checkpoint_files(tmp_path)
    future = time.time() + 1e8
    os.utime(oldest, (future, future))
    assert train_job(job).continued[-1].to_json() == {"epoch": 2, "torn": []}


def test_a_second_driver_reads_who_works(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        other = subprocess.run(
            [sys.executable, "-c", LOCK, str(run.path)], cwd=TOP, capture_output=True, text=True, check=False
        )
    assert f"process {os.getpid()} on host {os.uname().nodename} is working on it" in other.stderr
    assert not (run.path / OWNER).exists()


LOCK = """
import sys, pathlib
from harness.run.manifest import Manifest
from harness.run.directory import RunDirectory
lock = RunDirectory(pathlib.Path(sys.argv[1])).locked()
lock.__enter__()
print('held', flush=True)
sys.stdin.read()
"""


def test_what_a_killed_driver_held_is_taken_over(tmp_path):
    run = RunDirectory(tmp_path / "run")
    killed = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(run.path)], cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    assert killed.stdout.readline() == "held\n"
    killed.kill()
    killed.communicate()
    said: list[str] = []
    run.print_notices(said.append)
    with run.locked():
        assert len(said) == 1
        assert f"process {killed.pid} on host" in said[0]
        assert "taking over" in said[0]


def test_what_another_process_took_is_not_written(tmp_path, digits):
    """As on a node that was given up, and comes back while its trial runs elsewhere."""
    job = TrainingJob(config=SMALL_TRIAL, data=digits, folder=tmp_path)
    storage.acquire(tmp_path)
    loop = training_loop(job)
    next(loop)
    take = "import pathlib, sys; from harness.run import storage; storage.acquire(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", take, str(tmp_path)], cwd=TOP, check=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(storage.Superseded):
        list(loop)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    storage.release(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("victims", "signal"), [("driver,worker,node", "KILL"), ("driver,worker", "TERM")])
def test_a_killed_sweep_ends_as_if_left_alone(victims, signal, tmp_path):
    """At a moment each; `python -m benchmarks.kills` has more."""
    arguments = [f"victims=[{victims}]", f"signal={signal}", "kills=1", f"out={tmp_path / 'kills.csv'}"]
    done = command("-m", "benchmarks.kills", *arguments, cwd=TOP, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    n = len(victims.split(","))
    assert f"{n} of {n} as they must be" in done.stdout


@pytest.fixture(scope="session")
def left_alone(tmp_path_factory):
    """What the sweep of benchmarks/kills.py comes to."""
    return sweeps.Reference.of(tmp_path_factory.mktemp("left_alone") / "sweep").outcome


@pytest.fixture
def cluster():
    with sweeps.KillableCluster.of_three() as found:
        yield found


@contextlib.contextmanager
def running(folder: Path, *more: str):
    """A sweep with trials at work; whatever happens, nothing of it is left."""
    sweep = sweeps.Sweep(folder / "sweep", *more)
    sweep.start()
    try:
        sweep.until_running()
        yield sweep
    finally:
        for process in sweep.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


def until(condition, seconds: float):
    """What the condition comes to, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return found


def ends_equal(sweep: sweeps.Sweep, left_alone, seconds: float = 200.0) -> None:
    code, _ = sweep.wait(seconds)
    assert code == 0, sweep.said.read_text()
    assert sweeps.outcome(sweep.run) == left_alone


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_more_sigterms_while_it_ends(victim, left_alone, tmp_path):
    with running(tmp_path, "resources.retries=0") as sweep:
        targets = (
            [sweep.process] if victim == "driver" else until(lambda: sweeps.training_workers(sweep.processes()), 20)
        )
        for _ in range(300 if victim == "driver" else 2):  # every moment of the driver's end, which takes seconds
            with contextlib.suppress(psutil.NoSuchProcess):
                targets[0].send_signal(signal.SIGTERM)
            time.sleep(0.05)
            if sweep.process.poll() is not None:
                break
        if victim == "driver":
            assert sweep.wait(1) == (143, "stopped; run the same command again to continue")
            sweep.start()
        ends_equal(sweep, left_alone)


@pytest.mark.slow
def test_the_head_dies(left_alone, tmp_path):
    with running(tmp_path) as sweep:
        (head,) = [process for process in sweep.processes() if process.name() == "gcs_server"]
        head.kill()
        code, said = sweep.wait(60)
        assert code == 1
        assert "run the same command again to continue" in said
        sweep.start()
        ends_equal(sweep, left_alone)


@pytest.mark.slow
def test_a_node_hangs_and_comes_back(left_alone, cluster, tmp_path):
    """It is given up, its trial runs elsewhere; what it does when it comes back changes nothing."""
    with running(tmp_path, f"resources.address={cluster.cluster.address}") as sweep:
        node = until(cluster.training, 20)[0]
        raylet = psutil.Process(cluster.raylet(node))
        hanging = [raylet, *raylet.children(recursive=True)]
        for process in hanging:
            process.suspend()
        until(lambda: "continues from its last checkpoint" in sweep.said.read_text(), 90)
        for process in hanging:
            process.resume()
        ends_equal(sweep, left_alone)
        assert "its process died with node" in sweep.said.read_text()


@pytest.mark.slow
def test_a_node_is_drained(left_alone, cluster, tmp_path):
    """As before a preemption: its trial is placed again, and no retry spent."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    address = cluster.cluster.address
    with running(tmp_path, f"resources.address={address}", "resources.retries=0") as sweep:
        node = until(cluster.training, 20)[0]
        reason, in_a_second = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int(1000 * (time.time() + 1))
        accepted, why_not = GcsClient(address).drain_node(node.node_id, reason, "test", in_a_second)
        assert accepted, why_not
        time.sleep(1)
        cluster.kill(node)
        ends_equal(sweep, left_alone)
        assert "continues from its last checkpoint" in sweep.said.read_text()


@pytest.mark.slow
def test_no_network(left_alone, tmp_path):
    """In a network namespace of its own: images that are here need none, those that are not are told in one line."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs root, unshare and ip")

    def offline(*arguments: str) -> subprocess.CompletedProcess:
        script = 'ip link set lo up && exec "$@"'
        words = ["unshare", "-n", "sh", "-c", script, "sh", sys.executable, "-m", "harness.tune", *arguments]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)

    done = offline(*sweeps.SWEEP, "run=run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.outcome(RunDirectory(tmp_path / "run")) == left_alone
    done = offline("space=baseline", "data.name=cifar10", f"data.root={tmp_path / 'nowhere'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert "data.root" in done.stderr


@pytest.mark.slow
def test_the_run_directory_is_moved_away(left_alone, tmp_path):
    with running(tmp_path) as sweep:
        sweep.run.path.rename(tmp_path / "away")
        code, _ = sweep.wait(30)
        assert code == 1, sweep.said.read_text()
        assert "is gone" in sweep.said.read_text()
        assert not sweep.run.path.exists()
        (tmp_path / "away").rename(sweep.run.path)
        sweep.start()
        ends_equal(sweep, left_alone)
