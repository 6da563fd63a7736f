"""Set-ups in which a measured speed would mean something else than it says are told, none passes silently."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
from conftest import command, exported

from benchmarks.inference import conditions
from benchmarks.inference.runner import benchmark_exported
from benchmarks.inference.sitting import AGAIN, REFERENCE, Sitting
from export.runtimes.onnxruntime import elsewhere
from harness.config import BadInput, Benchmark
from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.progress import Progress

# A runtime of a user's own, and what is wrong with it.
RUNTIME = """
import hashlib, threading, time
import numpy as np
from export.runtimes.onnxruntime import load as real
FORMAT = "onnx"
def load(artifact, device, threads):
    predict = real(artifact, device, threads)
    calls, seen, first = [], set(), []
{fault}
"""
FAULTS = {
    "missing_library": "    import no_such_library",
    "wrong_channels": "    return lambda images: predict(np.ascontiguousarray(images[:, :, ::-1]))",
    "wrong_mean": "    return lambda images: predict(images + np.float32(0.5))",
    "swapped_classes": "    return lambda images: predict(images)[:, ::-1]",
    "keeps_its_first_answer": """
    def answer(images):
        first.append(1)
        if len(first) > 60:  # while it is timed
            calls[:] = calls or [predict(images)]
            return calls[0]
        return predict(images)
    return answer""",
    "more_threads": """
    def answer(images):
        work = lambda: hashlib.sha256(bytes(10_000_000)).digest()
        helpers = [threading.Thread(target=work) for _ in range(2)]
        [helper.start() for helper in helpers]
        [helper.join() for helper in helpers]
        return predict(images)
    return answer""",
    "cold_at_each_shape": """
    def answer(images):
        if len(images) not in seen:
            seen.add(len(images))
            time.sleep(0.5)
        return predict(images)
    return answer""",
}


def measured(run, **settings):
    """(inference_summary.csv by backend, verdict.json) of a short sitting."""
    short = {"runtimes": ["onnxruntime"], "batch_sizes": [8], "replicates": 2, "rounds": 2, "round_seconds": 0.02}
    settings = short | {"threads": 1, "max_accuracy_drop": 0.1} | settings
    benchmark_exported(run, Benchmark.model_validate(settings), Progress())
    summary = pd.read_csv(run.path / "inference_summary.csv", keep_default_na=False)
    return summary.set_index("backend"), json.loads((run.path / "verdict.json").read_text())


@pytest.fixture(scope="module")
def sitting(small_run, tmp_path_factory):
    """One sitting with every planted runtime."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(small_run[0], folder / "run")
    run, files = RunDirectory(folder / "run"), []
    manifest = storage.read_json(exported(run))
    manifest["files"] = {name: manifest["files"][name] for name in ("model.safetensors", "model.onnx")}
    storage.write_json(exported(run), manifest)
    for name, fault in FAULTS.items():
        (folder / f"{name}.py").write_text(RUNTIME.format(fault=fault))
        files.append(str(folder / f"{name}.py"))
    return measured(run, runtimes=["onnxruntime", *files])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("missing_library", "No module named 'no_such_library'"),
        ("wrong_channels", "failed the parity check"),
        ("wrong_mean", "failed the parity check"),
        ("swapped_classes", "failed the parity check"),
        ("keeps_its_first_answer", "from the checked ones"),
        ("more_threads", "cores, not 1"),
    ],
)
def test_a_planted_fault_is_reported(sitting, fault, told):
    summary, decided = sitting
    rows = summary.loc[[fault]]
    assert all(told in note for note in rows["note"]), rows["note"]
    timed = fault == "more_threads"
    assert (rows["ratio"] != "").all() == timed
    assert not decided["ship"]["backend"].startswith(fault)
    assert not timed or any(told in warning for warning in decided["warnings"])


@pytest.mark.slow
def test_memory_is_that_of_the_arm(sitting):
    """PyTorch's arm holds more than onnxruntime's, whoever started them."""
    summary, _ = sitting
    assert float(summary.loc["onnxruntime"]["peak_bytes"]) < 0.8 * float(summary.loc[REFERENCE]["peak_bytes"])


@pytest.mark.slow
def test_a_cold_start_is_no_part_of_the_speed(sitting):
    """Half a second at the first call of each shape: in the cold costs, not in the calls."""
    summary, _ = sitting
    row = summary.loc["cold_at_each_shape"]
    assert float(row["first_call_seconds"]) > 0.5
    assert float(row["latency_ms_p50"]) < 50


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stale file", "mislabelled precision", "changed weights"])
def test_a_harmed_file_is_not_timed(run, fault):
    file = exported(run)
    manifest = storage.read_json(file)
    model = file.parent / "model_rewritten.onnx"
    if fault == "stale file":
        model.write_bytes(model.read_bytes()[:-1] + b"\0")
        told = "its SHA-256 differs from manifest.json"
    elif fault == "mislabelled precision":
        shutil.copy(file.parent / "model_int8.onnx", model)
        manifest["files"][model.name]["sha256"] = storage.sha256(model)
        told = "the manifest says float32, the file holds int8"
    else:  # as by a wrong fold of a batch norm, in a file that is whole
        import onnx

        graph = onnx.load(model)
        weights = max(graph.graph.initializer, key=lambda i: math.prod(i.dims))
        values = onnx.numpy_helper.to_array(weights) * np.float32(1.05)
        weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
        onnx.save(graph, model)
        manifest["files"][model.name]["sha256"] = storage.sha256(model)
        told = "failed the parity check"
    storage.write_json(file, manifest)
    row = measured(run)[0].loc["onnxruntime rewritten"]
    assert told in row["note"]
    assert row["ratio"] == ""


@pytest.mark.parametrize("name", conditions.DEBUGGING)
def test_a_setting_for_debugging_is_refused(name):
    with pytest.raises(BadInput, match=rf"{name}=1: .* unset it"):
        conditions.check_no_debugging({name: "1"})
    conditions.check_no_debugging({name: "0", "OTHER": "1"})


def test_the_command_refuses_it_too(run, tmp_path):
    done = command("-m", "benchmarks", f"run={run.path}", cwd=tmp_path, TORCHDYNAMO_DISABLE="1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "TORCHDYNAMO_DISABLE=1: the environment variable turns torch.compile off" in done.stderr


def test_nodes_on_another_provider_are_listed(run):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    model = exported(run).parent / "model.onnx"
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert elsewhere(session, "CPUExecutionProvider", onnx.load(model)) == []
    nodes = elsewhere(session, "CUDAExecutionProvider", onnx.load(model))
    assert any("Conv" in node or "conv" in node for node in nodes)


def test_more_threads_than_cores_are_refused(run):
    with pytest.raises(RuntimeError, match=r"512 threads were asked for, and this process may use \d+ cores"):
        measured(run, threads=512)


@pytest.mark.slow
def test_other_work_on_the_machine_is_reported(run):
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        summary, decided = measured(run, round_seconds=0.1)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert all("cores during the measurement" in note for note in summary.loc["onnxruntime"]["note"].split("\n"))
    assert any("cores during the measurement" in warning for warning in decided["warnings"])


@pytest.mark.slow
def test_uint8_images_to_labels(run):
    """Files that take them, and PyTorch behind the same normalisation: the answers are those that were checked."""
    summary, decided = measured(run, uint8=True)
    assert {"onnxruntime uint8", "onnxruntime rewritten uint8"} <= {*summary.index}
    assert set(summary.index) - {REFERENCE, AGAIN} == {name for name in summary.index if name.endswith("uint8")}
    assert not any(note.startswith("not timed") for note in summary["note"])
    assert set(pd.read_csv(run.path / "inference.csv")["scope"]) == {"uint8 images to labels"}
    assert "from uint8 images to labels" in decided["sentence"]


@pytest.mark.slow
def test_an_interrupted_benchmark_continues(run, monkeypatch):
    """Replicates that are done are kept; asked anew for the same, nothing runs."""

    real, done = Sitting.replicate, []

    def stops(self, number, progress):
        if number == 1 and len(done) < 2:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(number)
        return real(self, number, progress)

    monkeypatch.setattr(Sitting, "replicate", stops)
    with pytest.raises(KeyboardInterrupt):
        measured(run)
    before = (run.path / "inference.csv").read_text()
    summary, _ = measured(run)
    assert done == [0, "stopped", 1]
    assert (run.path / "inference.csv").read_text().startswith(before)
    assert set(summary.loc["onnxruntime", ["replicates"]]) == {"2"} or summary.loc["onnxruntime", "replicates"] == 2
    measured(run)
    assert done == [0, "stopped", 1]


def test_arrays_on_the_device_are_for_a_gpu(run):
    with pytest.raises(BadInput, match=r"benchmark\.scope=device: needs a GPU"):
        measured(run, scope="device")
