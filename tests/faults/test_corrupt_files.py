"""Files that are cut off, changed or missing: what needs them is made again, and the user reads which they were."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL_RUN, TOP, command

from benchmarks import sweeps
from harness.config import BadInput
from harness.run.directory import BENCHMARKED, RunDirectory
from harness.run.manifest import Manifest


def tear(path: Path, how: str, draw: random.Random) -> None:
    """Cut the file off somewhere, or flip one of its bits."""
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[draw.randrange(len(content)) :]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def is_export_intact(run: RunDirectory, record) -> bool:
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
    exported = [is_export_intact(run, r) for r in with_export]
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
def test_a_corrupt_file_is_reported(kind, how, small_run, tmp_path):
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
def test_what_is_corrupt_is_made_again(small_run, tmp_path):
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


def test_run_json_and_its_copy_are_corrupt(small_run, tmp_path):
    shutil.copytree(small_run[0], tmp_path / "run")
    for name in ("run.json", "run.copy.json"):
        (tmp_path / "run" / name).write_text("{")
    with pytest.raises(BadInput, match=r"run\.json and its copy are corrupt"):
        RunDirectory(tmp_path / "run").configuration()


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
def test_compiled_code_that_is_corrupt(tmp_path):
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


STEPS = {"export": ".export-*/model.onnx", "benchmark": "inference.csv", "report": "report/figures/*.png"}


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
