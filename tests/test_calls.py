"""How a runtime is called and timed: operators, precision, arrays and tensors, on the host and on the device."""

import json
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import exported, parity

from benchmarks.inference import calls, conditions, operators, verdict
from benchmarks.inference import sitting as sitting_module
from benchmarks.inference.server import RuntimeServer
from benchmarks.inference.sitting import AGAIN, REFERENCE, Arm, Sitting
from benchmarks.inference.summary import summarize_rounds
from export import Artifact
from export.runtimes import Served, Unavailable
from export.runtimes.onnxruntime_graph import at_fixed_addresses
from harness.config import Benchmark, plugins
from harness.run.manifest import Manifest
from harness.run.progress import Progress


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


@pytest.mark.parametrize("uint8", [False, pytest.param(True, marks=pytest.mark.slow)])
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


MILLISECONDS = {("host", REFERENCE): 4.0, ("device", REFERENCE): 2.0, ("host", "fast"): 2.0}
MILLISECONDS |= {("device", "fast"): 0.5, ("host", "arrays alone"): 1.9}


class MadeUpProcess:
    """Answers as benchmarks.inference.server does, with the speeds of MILLISECONDS."""

    def __init__(self, arm, threads, images, log):
        self.arm, self.name = arm, arm.name.removesuffix("_again")
        self.cold = {"load_seconds": 1.0}
        self.scopes = [scope for scope, name in MILLISECONDS if name == self.name]

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
            seconds = [MILLISECONDS[self.scope, self.name] * 1e-3] * request["calls"]
            events = seconds if self.scope == "device" else []
            return {"seconds": seconds, "event_seconds": events, "away": 0.0, "cores": 1.0}
        return {"peak_bytes": 1, "peak_device_bytes": 2} if do == "memory" else {"operators": {}}


def test_both_scopes_in_one_sitting(monkeypatch, tmp_path):
    """Each arm in each scope that it can, ratios within a scope, a recommendation for the first."""
    monkeypatch.setattr(sitting_module, "ArmProcess", MadeUpProcess)
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
    summary = summarize_rounds(rows, cold, arms, REFERENCE, AGAIN, 0.005)
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
    told = verdict.decide(summary, pd.DataFrame(rows), settings, REFERENCE, AGAIN)
    assert (told.scope, told.ship["backend"]) == ("host arrays", "arrays alone")
    on_device = verdict.decide(summary, pd.DataFrame(rows), Benchmark(scope="device"), REFERENCE, AGAIN)
    assert (on_device.ship["backend"], on_device.ship["ratio"]) == ("fast", pytest.approx(4))
    alone = Sitting(arms, tmp_path, 1.0, Benchmark(scope="device", batch_sizes=[64]), 1, tmp_path / "log")
    rows, _, _ = alone.replicate(0, Progress())
    assert {row["backend"] for row in rows} == {REFERENCE, "fast", AGAIN}
    assert arms[2].note == "not timed: takes only host arrays"
    lines = verdict.verdict_lines(summary, told, REFERENCE, AGAIN)
    assert sum(line.startswith("device arrays, batch 64, fast on cuda: 128,000 images/s, 4.00") for line in lines) == 1
