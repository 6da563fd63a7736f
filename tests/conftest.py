"""What the tests share: a cache of their own, small data, and one small run through every stage."""

import contextlib
import importlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from harness.config import Data, Trial
from harness.run.directory import RunDirectory
from harness.run.manifest import ParityRecord
from harness.run.records import DataRecord, Metrics, RunRecord, TrialRecord
from tune_spaces import Space

TOP = Path(__file__).parent.parent
SMALL_SPACE = Path(__file__).parent / "spaces" / "small.py"

SMALL_TRIAL = Trial(
    architecture="baseline",
    options={"widths": [8, 16], "hidden": [16], "kernel_size": 3},
    epochs=3,
    batch_size=16,
    optimizer={"name": "adam"},
    checkpoint_seconds=0,
)


def asks_for_gpu(expression: str) -> bool:
    """Whether pytest's -m selects tests that need one."""
    return "gpu" in re.findall(r"\w+", expression.replace("not gpu", ""))


def pytest_configure(config):
    if not asks_for_gpu(config.option.markexpr):  # what is written for a CPU must not land on a GPU by chance
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device, or not run with -m gpu")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Decoded data of the tests does not mix with the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["HARNESS_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def digits():
    """200 small images of ten classes."""
    return Data(name="digits", limit=20)


@pytest.fixture(scope="session")
def cifar10_folder():
    """Real CIFAR-10 images in class folders."""
    folder = os.environ.get("HARNESS_CIFAR10_IMAGES")
    if not folder:
        pytest.skip("HARNESS_CIFAR10_IMAGES names no folder")
    return Path(folder)


def command(*arguments: str, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` as a user would."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def here(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The same as `command("-m", module, ...)` in this process, where PyTorch is imported already."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = [module, *arguments]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of runpy: the module is known already
                runpy.run_module(module, run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.argv = before
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def run_record(space: Space | None = None, side: int = 16) -> RunRecord:
    """run.json of a run on 1,000 training images of ten classes; of an ablation, what its report needs."""
    classes = list("0123456789")
    counts = {"train": 1000, "validation": 100, "test": 100}
    data = DataRecord(classes=classes, fingerprint="f", input_size=side, **counts)
    config = {"search": {"metric": "val_accuracy", "seeds": 3}, "data": {"name": "digits"}, "space": "small"}
    record = RunRecord(config=config, identity={}, data=data)
    if space is not None:
        record.claims = [vars(claim) for claim in space.claims]
        record.variants = {name: dict(changes) for name, changes in space.variants.items()}
        record.published = dict(space.published)
    return record


def records(run: Path) -> list[TrialRecord]:
    """The records of all trials of a run that ended."""
    return RunDirectory(run).trials()


SMALL_RUN = [
    "-m",
    "harness.tune",
    f"space={SMALL_SPACE}",
    "run=run",
    "benchmark.batch_sizes=[1,8]",
    "benchmark.replicates=2",
    "benchmark.rounds=2",
    "benchmark.round_seconds=0.01",
    "benchmark.runtimes=[torch_eager,onnxruntime]",
]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run directory after all stages of tests/spaces/small.py, and what the command printed."""
    folder = tmp_path_factory.mktemp("small")
    done = command(*SMALL_RUN, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


@pytest.fixture
def run(small_run, tmp_path):
    """A run whose exported files may be harmed."""
    shutil.copytree(small_run[0], tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def exported(run: RunDirectory) -> Path:
    """The manifest of the run's export."""
    (manifest,) = run.path.glob("exported/*/manifest.json")
    return manifest


def parity(lost=0, gained=0, images=10_000):
    """A parity record of these numbers of lost and gained images."""
    return ParityRecord(
        images=images,
        accuracy=0.8 + (gained - lost) / images,
        torch_accuracy=0.8,
        top1_agreement=1.0,
        max_logit_difference=1e-6,
        disagreeing=[],
        lost=lost,
        gained=gained,
        passed=True,
    )


def trial_record(index, seed, accuracy, stage="search", status="finished", variant=""):
    """A trial that ended with this validation accuracy."""
    return TrialRecord(
        id=f"{index}-{seed}",
        stage=stage,
        status=status,
        variant=variant,
        index=index,
        seed=seed,
        parameters={"x": index} if index else {},
        config={"x": variant or index},
        metrics=Metrics(val_accuracy=accuracy, val_loss=1 - accuracy),
    )


def one_error_line(arguments, monkeypatch, capsys, module="harness.tune"):
    """Run a command in this process on bad input; returns its one short error line."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    started = time.perf_counter()
    assert importlib.import_module(module).main() == 2
    assert time.perf_counter() - started < 5
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert len(line) <= 301
    assert line.rstrip("\n").isprintable()
    return line
