"""What goes wrong with machines, injected for real: each test is a fault, and asserts what a user then sees.

Kills of whole sweeps at random moments are in benchmarks/kills.py; some of them run here.
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

import pytest
from conftest import SMALL_RUN, TOP, command, records

from benchmarks import kills
from harness import checkpoint, results
from harness.checkpoint import StorageError
from harness.config import Trial
from harness.errors import BadInput
from harness.results import RunDirectory
from harness.trial import Job, train, training

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
    from export.__main__ import is_whole
    from harness.config import Export

    settings = Export.model_validate(run.configuration()["config"]["export"])
    return is_whole(run.exported_folder(record["id"]), record, settings)


def kept_checks(run: RunDirectory, record) -> list[bool]:
    """Whether what was found out about each exported file is still believed."""
    from export import SERVED_BY, Artifact
    from export.check import Check

    folder = run.exported_folder(record["id"])
    manifest = checkpoint.read_json(folder / "manifest.json")
    served = {n: SERVED_BY[f["format"]] for n, f in manifest["files"].items() if f["format"] in SERVED_BY}
    return [Check(Artifact(folder, manifest, n), runtime, "cpu").kept() is not None for n, runtime in served.items()]


def state_of(run: RunDirectory):
    """All that a command believes of a run directory, read anew."""
    run = RunDirectory(run.path)
    run.configuration()
    run.set_aside_torn()
    trials = run.trials()
    with_export = [r for r in trials if run.exported_folder(r["id"]).is_dir()]
    exported = [is_exported_whole(run, r) for r in with_export]
    believed = [kept for r, whole in zip(with_export, exported, strict=True) if whole for kept in kept_checks(run, r)]
    tables = [run.is_benchmark_whole(path.name) for path in sorted(run.path.glob("inference*.csv"))]
    tables.append(run.is_benchmark_whole("verdict.json"))
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
    assert done.stdout.count("run.json: is torn; its copy is used") == 1
    assert "has to run again" in done.stdout
    assert kills.outcome(run) == kills.outcome(RunDirectory(whole))
    (one,), (other,) = (sorted(folder.glob("exported/*/model.onnx")) for folder in (run.path, whole))
    assert one.read_bytes() == other.read_bytes()
    assert state_of(run) == state_of(RunDirectory(whole))


def test_run_json_and_its_copy_torn(small_run, tmp_path):
    shutil.copytree(small_run[0], tmp_path / "run")
    for name in ("run.json", "run.copy.json"):
        (tmp_path / "run" / name).write_text("{")
    with pytest.raises(BadInput, match=r"run\.json and its copy are torn"):
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
    checkpoint.write_atomically(file, "before")
    with largest_file(100), pytest.raises(StorageError, match=r"file: file too large, [\d,]+ bytes free there"):
        checkpoint.write_atomically(file, "x" * 1000)
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_trial_whose_weights_do_not_fit_goes_on_later(tmp_path, digits):
    job = Job(config=JOB, data=digits, folder=tmp_path / "trial")
    with largest_file(3000):  # records fit, weights do not
        record = train(job)
    assert record["status"] == "failed"
    assert "bytes free there" in record["error"]
    assert "weights_sha256" not in record
    run = train(job)
    alone = train(Job(config=JOB, data=digits, folder=tmp_path / "alone"))
    assert run["status"] == "finished"
    assert (run["metrics"], run["weights_sha256"]) == (alone["metrics"], alone["weights_sha256"])


def test_no_clock_decides_which_checkpoint_is_newest(tmp_path, digits):
    job = Job(config=JOB, data=digits, folder=tmp_path)

    loop = training(job)
    for row, _ in loop:
        if row["epoch"] >= 2:
            loop.close()
            break
    _, oldest = checkpoint.generations(tmp_path)
    future = time.time() + 1e8
    os.utime(oldest, (future, future))
    assert train(job)["continued"][-1] == {"epoch": 2, "torn": []}


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
    return kills.outcome(RunDirectory(folder / "run"))


SMALL_SWEEP = [*SMALL_RUN, "stages=[search]", "search.samples=2", "trial.checkpoint_seconds=0"]
# HARNESS_FULL_AFTER=1:100 tries each of the first hundred.
FIRST, LAST = (int(n) for n in os.environ.get("HARNESS_FULL_AFTER", "0:0").split(":"))
AFTER = range(FIRST, LAST + 1) if LAST else (1, 2, 4, 9, 14, 23)


@pytest.mark.slow
@pytest.mark.parametrize("after", AFTER)
def test_a_disk_that_is_full_after_so_many_writes(after, full_disk, alone, tmp_path):
    count = tmp_path / "count"
    count.write_bytes(bytes(8))
    full = {"LD_PRELOAD": str(full_disk), "FULL_BELOW": str(tmp_path / "run"), "FULL_COUNT": str(count)}
    done = command(*SMALL_SWEEP, cwd=tmp_path, **full, FULL_AFTER=str(after))
    if int.from_bytes(count.read_bytes(), "little") < after:
        pytest.skip("the sweep does not write so often")
    run = RunDirectory(tmp_path / "run")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no space left on device" in done.stdout + done.stderr
    assert "bytes free there" in done.stdout + done.stderr
    if run.configuration() is not None:
        run.set_aside_torn()
    assert not run._notices
    assert not [path for path in run.path.rglob(".*.*") if path.is_file()], "half written"
    again = command(*SMALL_SWEEP, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert kills.outcome(run) == alone


# ---------------------------------------------------------------------------------------------------- locks, processes


def test_a_second_driver_is_told_who_works(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        other = subprocess.run(
            [sys.executable, "-c", LOCK, str(run.path)], cwd=TOP, capture_output=True, text=True, check=False
        )
    assert f"process {os.getpid()} on host {os.uname().nodename} works on it" in other.stderr
    assert not (run.path / results.OWNER).exists()


LOCK = (
    "import sys, pathlib; from harness.results import RunDirectory as R; lock = R(pathlib.Path(sys.argv[1])).locked()"
)
LOCK += "; lock.__enter__(); print('held', flush=True); sys.stdin.read()"


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
    run.tell_notices(said.append)
    with run.locked():
        assert len(said) == 1
        assert f"process {killed.pid} on host" in said[0]
        assert "taken over" in said[0]


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
    found = {record["variant"]: record for record in records(tmp_path / "run")}
    assert found["fine"]["status"] == "finished"
    assert found["hangs"]["status"] == "failed"
    assert found["hangs"]["error"] == "timed out: no validation in 5 s (resources.timeout_seconds)"
    assert "goes on from its last checkpoint" in done.stdout  # tried again, once
    text = (tmp_path / "run" / "trials" / found["hangs"]["id"] / "error.txt").read_text()
    assert "net.py" in text


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
        (run / results.BENCHMARKED).unlink(missing_ok=True)
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
    assert ("is there" in done.stdout) == (stage != "export")
    assert {path: path.stat().st_mtime_ns for path in run.glob("trials/*/*")} == trials
    assert state_of(RunDirectory(run)) == state_of(RunDirectory(small_run[0]))
