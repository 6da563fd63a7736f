"""Disks that are full, read-only or too small: nothing is half written, and the same command continues later."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL_RUN, SMALL_TRIAL, command

from benchmarks import sweeps
from harness.config import ReportConfig
from harness.config.errors import StorageError
from harness.report import report
from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.progress import Progress
from harness.training.job import TrainingJob
from harness.training.loop import train_job


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


def test_a_log_that_lacks_a_line_is_reported_at_the_end(tmp_path):
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
    job = TrainingJob(config=SMALL_TRIAL, data=digits, folder=tmp_path / "trial")
    with largest_file(3000):  # records fit, weights do not
        record = train_job(job)
    assert record.status == "failed"
    assert "bytes free there" in record.error
    assert "weights_sha256" not in record
    run = train_job(job)
    alone = train_job(TrainingJob(config=SMALL_TRIAL, data=digits, folder=tmp_path / "alone"))
    assert run.status == "finished"
    assert (run.metrics, run.weights_sha256) == (alone.metrics, alone.weights_sha256)


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
    """Refused before anything starts; later fullness is that of the test above."""
    arguments = [a if a != "run=run" else f"run={small_disk / 'run'}" for a in SMALL_SWEEP]
    done = command(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert "MiB are free there; free some, or give another path" in done.stderr
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sweeps.outcome(RunDirectory(small_disk / "run")) == alone


def test_a_disk_that_is_read_only(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = command(*[a if a != "run=run" else f"run={small_disk / 'run'}" for a in SMALL_SWEEP], cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert "is not writable for this user" in done.stderr
    assert not (small_disk / "run").exists()
