"""Set-ups in which a measured speed would mean something else than it says are told, none passes silently."""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import command

from benchmarks.inference import calls, conditions, operators, verdict
from benchmarks.inference import sitting as sitting_module
from benchmarks.inference.runner import benchmark_exported
from benchmarks.inference.server import RuntimeServer
from benchmarks.inference.sitting import AGAIN, REFERENCE, Arm, Sitting, highest_rate
from export import Artifact
from export.runtimes import Served, Unavailable
from export.runtimes.onnxruntime import elsewhere
from export.runtimes.onnxruntime_graph import at_fixed_addresses
from harness.config import BadInput, Benchmark, plugins
from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest, ParityRecord
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


@pytest.fixture
def run(small_run, tmp_path):
    """A run whose exported files may be harmed."""
    shutil.copytree(small_run[0], tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def measured(run, **settings):
    """(inference_summary.csv by backend, verdict.json) of a short sitting."""
    short = {"runtimes": ["onnxruntime"], "batch_sizes": [8], "replicates": 2, "rounds": 2, "round_seconds": 0.02}
    settings = short | {"threads": 1, "max_accuracy_drop": 0.1} | settings
    benchmark_exported(run, Benchmark.model_validate(settings), Progress())
    summary = pd.read_csv(run.path / "inference_summary.csv", keep_default_na=False)
    return summary.set_index("backend"), json.loads((run.path / "verdict.json").read_text())


def exported(run):
    (manifest,) = run.path.glob("exported/*/manifest.json")
    return manifest


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
def test_a_planted_fault_is_told(sitting, fault, told):
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
    with pytest.raises(RuntimeError, match=r"4096 threads were asked for, and this process may use \d+ cores"):
        measured(run, threads=4096)


@pytest.mark.slow
def test_other_work_on_the_machine_is_told(run):
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


def parity(change=0.0, half=0.001):
    interval = {"mean": change, "low": change - half, "high": change + half, "n": 100}
    figures = {"accuracy": 0.8 + change, "torch_accuracy": 0.8, "top1_agreement": 1.0, "max_logit_difference": 1e-6}
    lists = {"disagreeing": [], "uncertain": []}
    return ParityRecord(**figures, **lists, accuracy_change=interval, images=100, passed=True)


def summary_of(speeds, changes=None, replicates=5):
    """Speeds by arm, with one percent of noise, at batch size 64."""
    generator = np.random.default_rng(0)
    arms = [
        SimpleNamespace(
            name=name,
            check=SimpleNamespace(artifact=SimpleNamespace(label=f"x/{name}.onnx"), device="cpu"),
            precision="float32",
            note="",
            accuracy=parity((changes or {}).get(name, 0.0)),
        )
        for name in speeds
    ]
    rows = []
    for replicate in range(replicates):
        for turn in range(3):
            for name, speed in {**speeds, AGAIN: speeds[REFERENCE]}.items():
                seconds = 64 / speed * float(np.exp(generator.normal(0, 0.01)))
                rows.append(
                    {"backend": name, "scope": "host arrays", "batch_size": 64, "replicate": replicate, "round": turn}
                    | {"images": 64, "seconds": seconds, "call_ms": f"{1000 * seconds:.4g}", "event_ms": ""}
                    | {"foreign_cores": 0.0, "note": ""}
                )
    cold = [{"backend": name, "load_seconds": 1.0, "peak_bytes": 1e8} for name in [*speeds, AGAIN]]
    return verdict.summarize_rounds(rows, cold, arms, REFERENCE, AGAIN)


def test_what_to_ship():
    speeds = {REFERENCE: 400.0, "fast": 800.0, "faster": 1200.0}
    told = verdict.decide(summary_of(speeds), Benchmark(), REFERENCE, AGAIN)
    assert told.ship["backend"] == "faster"
    assert told.ship["ratio"] == pytest.approx(3.0, rel=0.02)
    assert told.tied == []
    assert "at batch 64, accuracy +0.00 [-0.10, +0.10] points" in told.sentence
    # The fastest one costs too much accuracy.
    told = verdict.decide(summary_of(speeds, {"faster": -0.0045}), Benchmark(), REFERENCE, AGAIN)
    assert told.ship["backend"] == "fast"
    told = verdict.decide(summary_of(speeds), Benchmark(latency_ms=100), REFERENCE, AGAIN)
    assert told.ship is None  # 15 calls are too few for the quantile
    assert "no arm meets the constraints" in told.sentence


def test_equally_fast_ones_are_called_so():
    told = verdict.decide(summary_of({REFERENCE: 400.0, "a": 800.0, "b": 801.0}), Benchmark(), REFERENCE, AGAIN)
    assert told.tied == [{"a": "b", "b": "a"}[told.ship["backend"]]]
    assert "cannot be distinguished" in told.sentence


def test_replicates_not_rounds_make_the_interval():
    """A process that happens to be slow counts once, however many rounds it measures."""
    generator = np.random.default_rng(0)
    rows = []
    for replicate in range(5):
        luck = float(np.exp(generator.normal(0, 0.1)))
        for turn in range(50):
            for name in (REFERENCE, AGAIN, "other"):
                seconds = 0.1 * (luck if name == "other" else 1.0)
                rows.append(
                    {"backend": name, "scope": "host arrays", "batch_size": 64, "replicate": replicate, "round": turn}
                    | {
                        "images": 64,
                        "seconds": seconds,
                        "call_ms": "1",
                        "event_ms": "",
                        "foreign_cores": 0.0,
                        "note": "",
                    }
                )
    arms = [
        SimpleNamespace(
            name=name,
            check=SimpleNamespace(artifact=SimpleNamespace(label="x/m.onnx"), device="cpu"),
            precision="float32",
            note="",
            accuracy=parity(),
        )
        for name in (REFERENCE, "other")
    ]
    cold = [{"backend": name, "load_seconds": 1.0} for name in (REFERENCE, AGAIN, "other")]
    row = verdict.summarize_rounds(rows, cold, arms, REFERENCE, AGAIN).set_index("backend").loc["other"]
    assert row["ratio_high"] / row["ratio_low"] > 1.05  # 1.003 if each round counted


class Queue:
    """Answers an image in `service` seconds, one after the other."""

    def __init__(self, service):
        self.service = service

    def ask(self, do, rate, seconds, seed):
        assert do == "serve"
        arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, max(2, round(rate * seconds))))
        free, latencies = 0.0, []
        for arrival in arrivals:
            free = max(free, arrival) + self.service
            latencies.append(free - arrival)
        return {"latencies": latencies}


def test_the_highest_rate_under_a_latency():
    found = highest_rate(Queue(0.01), 50, 0)
    assert 40 < found < 110  # never much above what the queue can do at all
    assert highest_rate(Queue(0.001), 50, 0) > 5 * found
    assert highest_rate(Queue(0.01), 5, 0) == 0


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("QLinearConv", "convolution"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::addmm", "matrix product"),
        ("QGemm", "matrix product"),
        ("aten::mish", "activation"),
        ("NhwcMaxPool", "pooling"),
        ("DequantizeLinear", "to and from int8"),
        ("GatherElements", "lookup"),
        ("Cast", "layout and copies"),
        ("aten::native_batch_norm", "batch norm"),
        ("Div", "elementwise"),
        ("graph_0_cpp_fused", "other"),
    ],
)
def test_operators_of_both_runtimes_have_one_kind(operator, kind):
    assert operators.kind(operator) == kind


def test_a_profile_holds_the_model(run):
    images = np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype(np.float32)
    found = operators.of_onnxruntime(exported(run).parent / "model.onnx", images, 1, 5)
    kinds = {operators.kind(name) for name in found}
    assert {"convolution", "pooling", "matrix product"} <= kinds
    assert all(0 < seconds < 1 for seconds in found.values())


@pytest.mark.parametrize("name", ["model.onnx", "model_int8.onnx", "model.safetensors"])
def test_precision_as_found_in_the_file(run, name):
    entry = json.loads(exported(run).read_text())["files"][name]
    assert conditions.found_precision(exported(run).parent / name) == entry["precision"]


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("runtime", ["torch_eager", "onnxruntime"])
def test_a_call_with_tensors_answers_as_with_arrays(run, tmp_path, runtime, uint8):
    """Here the device is the CPU: the same code binds a GPU's memory."""
    file = "model.safetensors" if runtime == "torch_eager" else f"model{'_uint8' if uint8 else ''}.onnx"
    generator = np.random.default_rng(0)
    side = Manifest.read(exported(run)).input_size
    shape = (40, side, side, 3) if uint8 else (40, 3, side, side)
    images = generator.integers(0, 256, shape, dtype=np.uint8) if uint8 else generator.normal(size=shape)
    np.save(tmp_path / "images.npy", images.astype(np.uint8 if uint8 else np.float32))
    arm = RuntimeServer()
    arm.load(str(exported(run).parent), file, runtime, "cpu", 1, str(tmp_path / "images.npy"))
    arm.answers(str(tmp_path / "answers.npy"), 40)
    for scope in ("host", "device"):
        arm.warm_up(8, str(tmp_path / "answers.npy"), scope)
        told = arm.measure(7)
        assert told["away"] < 1e-4
        assert len(told["seconds"]) == 7
        assert told["event_seconds"] == []  # a CPU has none
    arm.checked = arm.checked + 1
    assert arm.measure(1)["away"] > 0.5  # answers are compared, on the device too


def test_images_in_another_layout_are_no_input(run, tmp_path):
    folder = exported(run).parent
    artifact = Artifact(folder, Manifest.read(exported(run)), "model.onnx")
    served = plugins.load("export.runtimes", "onnxruntime", "load")(artifact, "cpu", 1)
    images = torch.randn(2, 3, *[artifact.manifest.input_size] * 2)
    assert torch.allclose(served.on_device(images), torch.from_numpy(served(images.numpy())), atol=1e-6)
    with pytest.raises(ValueError, match="onnxruntime needs contiguous tensors"):
        served.on_device(images.to(memory_format=torch.channels_last))


def test_calls_at_fixed_addresses_answer_each_batch(run, monkeypatch):
    """As a CUDA graph needs them; here with the CPU's memory."""
    waits = []
    stream = SimpleNamespace(synchronize=lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    session = onnxruntime.InferenceSession(exported(run).parent / "model.onnx", providers=["CPUExecutionProvider"])
    side = Manifest.read(exported(run)).input_size
    images = torch.randn(3, 4, 3, side, side)
    call, found = at_fixed_addresses(session, torch.empty_like(images[0])), []
    for number, batch in enumerate(images, 1):
        found.append(call(batch))
        assert torch.allclose(found[-1], torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]), atol=1e-5)
        assert len(waits) == number  # before onnxruntime reads what is copied
    assert len({logits.data_ptr() for logits in found}) == 1


def test_the_clock_waits_for_the_device(monkeypatch):
    """A call is over when the device is done; the second clock is around the call alone."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def elapsed_time(self, other):
            assert other is not self
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    logits = torch.ones(2, 3)

    def on_device(images):
        happened.append("call")
        logits.fill_(images.sum())
        return logits  # its own memory, again and again

    served = Served(lambda images: images, on_device)
    done = calls.timed(served, "device", "cuda", [torch.full((1,), 1.0), torch.full((1,), 2.0)])
    assert happened == ["record", "record"] + ["record", "call", "record", "wait"] * 2
    assert done.event_seconds == [1.5e-3, 1.5e-3]
    assert [found[0, 0] for found in done.logits] == [1.0, 2.0]


def test_what_takes_arrays_alone_is_absent_on_the_device():
    with pytest.raises(Unavailable, match="takes only host arrays"):
        calls.timed(lambda images: images, "device", "cuda", [torch.ones(1)])


def test_both_scopes_in_one_sitting(monkeypatch, tmp_path):
    """Each arm in each scope that it can, ratios within a scope, a recommendation for the first."""
    milliseconds = {("host", REFERENCE): 4.0, ("device", REFERENCE): 2.0, ("host", "fast"): 2.0}
    milliseconds |= {("device", "fast"): 0.5, ("host", "arrays alone"): 1.9}

    class Process:
        def __init__(self, arm, threads, images, log):
            self.arm, self.name = arm, arm.name.removesuffix("_again")
            self.cold = {"load_seconds": 1.0}
            self.scopes = [scope for scope, name in milliseconds if name == self.name]

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def close(self): ...

        def ask(self, do, **request):
            if do == "warm_up":
                self.scope = request["scope"]
                assert self.scope in self.scopes
                return {"call_seconds": 0.01, "settled": True}
            if do == "measure":
                seconds = [milliseconds[self.scope, self.name] * 1e-3] * request["calls"]
                events = seconds if self.scope == "device" else []
                return {"seconds": seconds, "event_seconds": events, "away": 0.0, "cores": 1.0}
            return {"peak_bytes": 1, "peak_device_bytes": 2} if do == "memory" else {"operators": {}}

    monkeypatch.setattr(sitting_module, "RuntimeProcess", Process)
    arms = []
    for name in (REFERENCE, "fast", "arrays alone"):
        artifact = SimpleNamespace(label=f"x/{name}.onnx")
        check = SimpleNamespace(artifact=artifact, device="cuda", answers=tmp_path / "answers.npy")
        arms.append(Arm(name, check, "float32", accuracy=parity()))
    settings = Benchmark(scope="both", batch_sizes=[64], replicates=2)
    one = Sitting(arms, tmp_path, 1.0, settings, 1, tmp_path / "log")
    rows, cold = [], []
    for number in range(2):
        more, costs, _ = one.replicate(number, Progress())
        rows += more
        cold += costs
    summary = verdict.summarize_rounds(rows, cold, arms, REFERENCE, AGAIN)
    ratios = {(row.scope, row.backend): row.ratio for row in summary.itertuples()}
    assert ratios[("host arrays", "fast")] == pytest.approx(2.0)
    assert ratios[("device arrays", "fast")] == pytest.approx(4.0)
    assert ratios.keys() == {
        (s, b) for s in settings.scopes.values() for b in (REFERENCE, "fast", "arrays alone", AGAIN)
    }
    absent = summary[summary["ratio"].isna()]
    assert absent[["scope", "backend", "note"]].values.tolist() == [
        ["device arrays", "arrays alone", "takes only host arrays"]
    ]
    assert set(summary["peak_device_bytes"].dropna()) == {2.0}
    told = verdict.decide(summary, settings, REFERENCE, AGAIN)
    assert (told.scope, told.ship["backend"]) == ("host arrays", "arrays alone")
    assert verdict.decide(summary, Benchmark(scope="device"), REFERENCE, AGAIN).ship["backend"] == "fast"
    alone = Sitting(arms, tmp_path, 1.0, Benchmark(scope="device", batch_sizes=[64]), 1, tmp_path / "log")
    rows, _, _ = alone.replicate(0, Progress())
    assert {row["backend"] for row in rows} == {REFERENCE, "fast", AGAIN}
    assert arms[2].note == "not timed: takes only host arrays"
    lines = verdict.verdict_lines(summary, told, REFERENCE, AGAIN)
    assert sum(line.startswith("device arrays, batch 64, fast on cuda: 128,000 images/s, 4.00") for line in lines) == 1


def test_arrays_on_the_device_are_for_a_gpu(run):
    with pytest.raises(BadInput, match=r"benchmark\.scope=device: needs a GPU"):
        measured(run, scope="device")
