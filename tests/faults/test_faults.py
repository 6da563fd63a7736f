"""What goes wrong with machines, injected for real: each test is a fault, and asserts what a user then sees.

    python -m pytest tests/faults                          a fast sample, part of the default tests
    python -m pytest tests/faults -m 'slow or not slow'    all of it

Kills of whole sweeps at random moments are in benchmarks/kills.py, some of them run here; an hour of them is
benchmarks/soak.py. Of what can happen, this is not here:

- memory of a GPU that is full: on a machine without one the exception is raised where PyTorch raises it; whether the
  memory is free for the next trial is seen to by giving the next attempt a fresh process, on any device;
- a loss that jumps and comes back: no fault; finite losses go on, `trial.gradient_clip` is the user's remedy, and the
  same seed jumps in the same place;
- a sweep of 10,000 trials: takes hours; that the driver's share does not grow with their number is what handing out
  trials one by one is for;
- a clock that is set back while a command runs: durations are monotonic, and no decision reads the wall clock;
- Ray's own state torn (tuner.pkl, experiment state): is never read.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import SMALL_RUN, TOP, command, records

from benchmarks import sweeps
from harness.config import BadInput, ReportConfig, Trial
from harness.report import report
from harness.run import checkpoints, storage
from harness.run.cache import compiled_folder
from harness.run.directory import BENCHMARKED, OWNER, RunDirectory
from harness.run.manifest import Manifest
from harness.run.progress import Progress
from harness.run.storage import StorageError
from harness.training.job import TrainingJob
from harness.training.loop import train_job, training_loop

# ---------------------------------------------------------------------------------------------------------- torn files


def tear(path: Path, how: str, draw: random.Random) -> None:
    """Cut the file off somewhere, or flip one of its bits."""
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[draw.randrange(len(content)) :]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def is_exported_whole(run: RunDirectory, record) -> bool:
    from export.exporter import is_exported
    from harness.config import Export

    settings = Export.model_validate(run.configuration().config["export"])
    return is_exported(run.exported_folder(record.id), record, settings)


def kept_checks(run: RunDirectory, record) -> list[bool]:
    """Whether what was found out about each exported file is still believed."""
    from export import SERVED_BY, Artifact
    from export.check import Check

    folder = run.exported_folder(record.id)
    manifest = Manifest.read(folder / "manifest.json")
    served = {n: SERVED_BY[f.format] for n, f in manifest.files.items() if f.format in SERVED_BY}
    return [Check(Artifact(folder, manifest, n), runtime, "cpu").stored() is not None for n, runtime in served.items()]


def state_of(run: RunDirectory):
    """All that a command believes of a run directory, read anew."""
    run = RunDirectory(run.path)
    run.configuration()
    run.set_aside_corrupt()
    trials = run.trials()
    with_export = [r for r in trials if run.exported_folder(r.id).is_dir()]
    exported = [is_exported_whole(run, r) for r in with_export]
    believed = [kept for r, whole in zip(with_export, exported, strict=True) if whole for kept in kept_checks(run, r)]
    tables = [run.is_benchmark_intact(path.name) for path in sorted(run.path.glob("inference*.csv"))]
    tables.append(run.is_benchmark_intact("verdict.json"))
    return len(trials), exported, believed, tables, list(run._notices)


# All that is read again, by kind. What is written anew by each command is none of them: trials.csv, report/, and
# run.copy.json, which is only read in the place of another.
KINDS = ["run.json", "trials/*/trial.json", "trials/*/history.csv", "trials/*/model.safetensors"]
KINDS += [f"exported/*/{name}" for name in ("manifest.json", "*.onnx", "model.safetensors", "reference.npy")]
KINDS += ["exported/*/checks/*-cpu.json", "exported/*/checks/*-cpu.npy", "exported/benchmarked.json"]
KINDS += ["inference.csv", "inference_summary.csv", "verdict.json"]


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_file_is_told(kind, how, small_run, tmp_path):
    """Eight places of every kind, 224 together."""
    run, _ = small_run
    before = state_of(RunDirectory(run))
    draw = random.Random(f"{kind} {how}")
    for number in range(8):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        # Checks of arms that are not the default's are not asked for by `state_of`.
        files = [p for p in sorted(copy.glob(kind)) if "checks" not in kind or p.name.startswith("onnxruntime")]
        file = draw.choice(files)
        tear(file, how, draw)
        assert state_of(RunDirectory(copy)) != before, f"{file.name} {number}"
        shutil.rmtree(copy)


@pytest.mark.slow
def test_what_is_torn_is_made_again(small_run, tmp_path):
    """A file of every kind at once, and the same command: the same outcome."""
    whole, _ = small_run
    shutil.copytree(whole, tmp_path / "run")
    draw = random.Random(5)
    run = RunDirectory(tmp_path / "run")
    kinds = [*KINDS, "trials.csv", "report/index.html", "report/figures/*.png"]
    for kind in kinds:
        tear(draw.choice(sorted(run.path.glob(kind))), draw.choice(["truncated", "flipped"]), draw)
    done = command(*SMALL_RUN, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("run.json: is corrupt; using run.copy.json") == 1
    assert "must run again" in done.stdout
    assert sweeps.outcome(run) == sweeps.outcome(RunDirectory(whole))
    (one,), (other,) = (sorted(folder.glob("exported/*/model.onnx")) for folder in (run.path, whole))
    assert one.read_bytes() == other.read_bytes()
    assert state_of(run) == state_of(RunDirectory(whole))


def test_run_json_and_its_copy_torn(small_run, tmp_path):
    shutil.copytree(small_run[0], tmp_path / "run")
    for name in ("run.json", "run.copy.json"):
        (tmp_path / "run" / name).write_text("{")
    with pytest.raises(BadInput, match=r"run\.json and its copy are corrupt"):
        RunDirectory(tmp_path / "run").configuration()


# ------------------------------------------------------------------------------------------------------- disks, clocks


JOB = Trial(
    architecture="baseline",
    options={"widths": [8, 16], "hidden": [16], "kernel_size": 3},
    epochs=3,
    batch_size=16,
    optimizer={"name": "adam"},
    checkpoint_seconds=0,
)


@contextlib.contextmanager
def largest_file(size: int):
    """Files of this process may not grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_does_not_fit_leaves_what_was_there(tmp_path):
    file = tmp_path / "file"
    storage.write_atomically(file, "before")
    with largest_file(100), pytest.raises(StorageError, match=r"file: file too large, [\d,]+ bytes free there"):
        storage.write_atomically(file, "x" * 1000)
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_log_that_lacks_a_line_is_told_in_the_end(tmp_path):
    """Meanwhile results come first."""
    progress = Progress(tmp_path / "run.log")
    with largest_file(10):
        progress.line("one")
        progress.line("two")
    with pytest.raises(StorageError, match=r"run\.log: file too large, [\d,]+ bytes free there"):
        progress.check_logged()


def test_a_report_whose_log_does_not_fit_is_no_success(tmp_path, small_run):
    run = tmp_path / "run"
    shutil.copytree(small_run[0], run)
    with (run / "run.log").open("ab") as log:
        log.truncate(1 << 26)
    with largest_file(1 << 26), pytest.raises(StorageError, match=r"run\.log: file too large"):
        report(ReportConfig(run=run))
    assert (run / "report" / "index.html").stat().st_size > 0


def test_a_trial_whose_weights_do_not_fit_goes_on_later(tmp_path, digits):
    job = TrainingJob(config=JOB, data=digits, folder=tmp_path / "trial")
    with largest_file(3000):  # records fit, weights do not
        record = train_job(job)
    assert record.status == "failed"
    assert "bytes free there" in record.error
    assert "weights_sha256" not in record
    run = train_job(job)
    alone = train_job(TrainingJob(config=JOB, data=digits, folder=tmp_path / "alone"))
    assert run.status == "finished"
    assert (run.metrics, run.weights_sha256) == (alone.metrics, alone.weights_sha256)


def test_no_clock_decides_which_checkpoint_is_newest(tmp_path, digits):
    job = TrainingJob(config=JOB, data=digits, folder=tmp_path)

    loop = training_loop(job)
    for row, _ in loop:
        if row["epoch"] >= 2:
            loop.close()
            break
    _, oldest = checkpoints.checkpoint_files(tmp_path)
    future = time.time() + 1e8
    os.utime(oldest, (future, future))
    assert train_job(job).continued[-1].to_json() == {"epoch": 2, "torn": []}


@pytest.fixture(scope="session")
def full_disk(tmp_path_factory):
    """The library that makes disks full."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("full") / "full_disk.so"
    source = Path(__file__).with_name("full_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """What the small sweep comes to."""
    folder = tmp_path_factory.mktemp("alone")
    assert command(*SMALL_SWEEP, cwd=folder).returncode == 0
    return sweeps.outcome(RunDirectory(folder / "run"))


# More than a hundred writes; HARNESS_FULL_AFTER=1:100 tries each of the first hundred.
SMALL_SWEEP = [*SMALL_RUN, "stages=[search]", "search.samples=8", "trial.checkpoint_seconds=0"]
FIRST, LAST = (int(n) for n in os.environ.get("HARNESS_FULL_AFTER", "0:0").split(":"))
AFTER = range(FIRST, LAST + 1) if LAST else (1, 2, 3, 9, 23, 100)


@pytest.mark.slow
@pytest.mark.parametrize("after", AFTER)
def test_a_disk_that_is_full_after_so_many_writes(after, full_disk, alone, tmp_path):
    count = tmp_path / "count"
    count.write_bytes(bytes(8))
    full = {"LD_PRELOAD": str(full_disk), "FULL_BELOW": str(tmp_path / "run"), "FULL_COUNT": str(count)}
    done = command(*SMALL_SWEEP, cwd=tmp_path, **full, FULL_AFTER=str(after))
    assert int.from_bytes(count.read_bytes(), "little") >= after, "the sweep does not write so often"
    run = RunDirectory(tmp_path / "run")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no space left on device" in done.stdout + done.stderr
    assert "bytes free there" in done.stdout + done.stderr
    if run.configuration() is not None:
        run.set_aside_corrupt()
    assert not run._notices
    assert not [path for path in run.path.rglob(".*.*") if path.is_file()], "half written"
    again = command(*SMALL_SWEEP, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert sweeps.outcome(run) == alone


# ---------------------------------------------------------------------------------------------------- locks, processes


def test_a_second_driver_is_told_who_works(tmp_path):
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
    job = TrainingJob(config=JOB, data=digits, folder=tmp_path)
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


HANGS = """
import time
from architectures.baseline import build as network
def build(num_classes, input_size=32, hang=False):
    net = network(num_classes, input_size=input_size, widths=(8, 16), hidden=(16,))
    if hang:
        net.register_forward_hook(lambda *_: time.sleep(1e6) if net.training else None)
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("may not mount file systems")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_disk_is_full_and_then_larger(small_disk, alone, tmp_path):
    arguments = [a if a != "run=run" else f"run={small_disk / 'run'}" for a in SMALL_SWEEP]
    block = small_disk / "block"
    block.write_bytes(bytes(900 << 10))
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no space left on device" in done.stdout + done.stderr
    assert "bytes free there" in done.stdout + done.stderr
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.outcome(RunDirectory(small_disk / "run")) == alone


def test_a_disk_that_is_read_only(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = command(*[a if a != "run=run" else f"run={small_disk / 'run'}" for a in SMALL_SWEEP], cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stdout + done.stderr
    assert "read-only file system" in done.stderr
    assert not (small_disk / "run").exists()


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


COMPILED = """
import sys
from pathlib import Path
import torch
from harness.training import execution
from harness.config import Data, Trial
from harness.training.job import TrainingJob
from harness.training.loop import train_job
execution.prepare_process(1)
torch.set_num_threads(1)
options = {"widths": [8], "hidden": [8]}
trial = Trial(architecture="baseline", options=options, epochs=1, batch_size=16, compile="default")
record = train_job(TrainingJob(trial, Data(name="digits", limit=20), folder=Path(sys.argv[1])))
print(record.status, record.weights_sha256, record.error)
print("compiled anew" if record.compiled_anew is not None else "")
"""


@pytest.mark.slow
def test_compiled_code_that_is_torn(tmp_path):
    """Eight processes compile the same network at once; then every file of the cache is garbage."""

    def compiling(number: int) -> subprocess.Popen:
        own = {"HARNESS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(TOP)}
        own["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache" / "compiled")
        words = [sys.executable, "-W", "ignore", "-c", COMPILED, str(tmp_path / str(number))]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **own})

    processes = [compiling(number) for number in range(8)]
    said = {process.communicate(timeout=300)[0] for process in processes}
    assert len(said) == 1
    assert next(iter(said)).startswith("finished")
    draw, torn = random.Random(0), 0
    for file in (tmp_path / "cache" / "compiled").rglob("*"):
        if file.is_file() and file.stat().st_size and file.suffix not in (".lock", ".done"):
            tear(file, "truncated", draw)
            if file.suffix == ".py":  # cut anywhere, it might still be a program
                file.write_text("(")
            torn += 1
    assert torn > 3
    again, _ = compiling(8).communicate(timeout=300)
    # PyTorch may notice by itself; where it does not, the next test's way is taken, and told.
    assert again.splitlines()[0] == next(iter(said)).splitlines()[0]


def test_a_compiler_that_fails_once_is_asked_again(digits, tmp_path, monkeypatch):
    """As where what it finds in its cache cannot be loaded; the cache is emptied, and the result is the same."""
    from harness.training import setup

    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    job = TrainingJob(config=JOB, data=digits, folder=tmp_path / "trial")
    alone = train_job(TrainingJob(config=JOB, data=digits, folder=tmp_path / "alone"))
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


# --------------------------------------------------------------------------------------------------- later stages


STEPS = {"export": "exported/*/model.onnx", "benchmark": "inference.csv", "report": "report/figures/*.png"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STEPS)
def test_killed_in_a_later_stage_only_what_is_missing_is_done(stage, small_run, tmp_path):
    """Killed as soon as the stage's first file is there."""
    shutil.copytree(small_run[0], tmp_path / "run")
    run = tmp_path / "run"
    later = list(STEPS)[list(STEPS).index(stage) :]
    for name in later:
        for gone in {"export": "exported/*", "benchmark": "inference*", "report": "report"}[name].split():
            for path in run.glob(gone):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if stage != "report":
        (run / "verdict.json").unlink()
        (run / BENCHMARKED).unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, *SMALL_RUN], cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not list(run.glob(STEPS[stage])):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    trials = {path: path.stat().st_mtime_ns for path in run.glob("trials/*/*")}
    done = command(*SMALL_RUN, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 trials to run" in done.stdout
    assert ("is already" in done.stdout) == (stage != "export")
    assert {path: path.stat().st_mtime_ns for path in run.glob("trials/*/*")} == trials
    assert state_of(RunDirectory(run)) == state_of(RunDirectory(small_run[0]))
