"""pytest-benchmark checks: `python -m pytest benchmarks`.

Absolute times are recorded, with unit and environment in each entry (`--benchmark-json=FILE`), and compared by
`--benchmark-compare` on the same machine. Only ratios between arms of one run are asserted.
"""

import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import timing
from benchmarks.inference.sitting import Arm, ArmProcess
from export import Artifact
from export.check import Check
from harness.config import Augmentation, Data, Optimizer, Trial, plugins
from harness.data.augmentation import Draws
from harness.data.batches import DeviceSplit
from harness.data.dataset import load_dataset
from harness.run import checkpoints, storage, system
from harness.run.manifest import FileEntry, Manifest
from harness.training.execution import ExecutionPlan
from harness.training.network import build_network
from harness.training.step import make_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 64


@pytest.fixture(autouse=True)
def described(benchmark):
    """Record unit and environment with every figure."""
    benchmark.extra_info |= {"unit": "seconds", "device": str(DEVICE), "threads": torch.get_num_threads()}
    benchmark.extra_info |= system.environment().to_json()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def training_step(name: str, **changes):
    """A callable that trains network `name` on one batch of 64 images of 32x32, and waits for the device."""
    options = {"resize": 64} if name == "transfer" else {}
    trial = Trial.model_validate(
        {"architecture": name, "options": options, "optimizer": Optimizer(name="sgd", lr=0.01)} | changes
    )
    torch.manual_seed(0)
    plan = ExecutionPlan.of(trial, DEVICE)
    step = make_step(build_network(trial, 10, 32).train(), trial, plan, DEVICE)
    images = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8, device=DEVICE)
    rows = torch.arange(BATCH, device=DEVICE)
    part = DeviceSplit(images, torch.randint(0, 10, (BATCH,), device=DEVICE), rows)
    draws = Draws.of(rows, trial, 0)
    return lambda: step(part, draws, 0.01).tolist()


@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_training_step(benchmark, name):
    call = training_step(name)
    benchmark.extra_info["images"] = BATCH
    benchmark.pedantic(call, rounds=5, warmup_rounds=2)


def test_augmentation_costs_little_of_a_step(benchmark):
    """A step with flip and crop on the batch tensor takes at most a fifth longer than without."""
    arms = {
        "plain": training_step("final", precision="float32"),
        "augmented": training_step("final", precision="float32", augmentation=Augmentation(flip=True, crop_padding=4)),
    }
    rounds = benchmark.pedantic(timing.interleave, args=(arms, 6, 0.05, 0), rounds=1)
    fastest = {arm: min(r.seconds / r.calls for r in rounds if r.arm == arm) for arm in arms}
    benchmark.extra_info["ratio"] = fastest["augmented"] / fastest["plain"]
    assert fastest["augmented"] < 1.2 * fastest["plain"]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the kernels are for CPUs")
def test_own_kernels_make_a_step_shorter(benchmark):
    """With our kernels of Mish, max pooling and convolution, a step of `final` takes at most 0.65 of the eager one."""
    arms = {mode: training_step("final", precision="float32", compile=mode) for mode in ("off", "kernels")}
    rounds = benchmark.pedantic(timing.interleave, args=(arms, 6, 0.05, 0), rounds=1)
    fastest = {arm: min(r.seconds / r.calls for r in rounds if r.arm == arm) for arm in arms}
    benchmark.extra_info["ratio"] = fastest["kernels"] / fastest["off"]
    assert fastest["kernels"] < 0.65 * fastest["off"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """3,000 PNG files in two classes."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(1_500):
            Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def test_data_load_cold(benchmark, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    benchmark.extra_info["images"] = 3_000
    benchmark.pedantic(load_dataset, args=(Data(name="images", root=folder),), rounds=1)


def test_data_load_cached_is_a_tenth_of_cold(benchmark, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    data = Data(name="images", root=folder)
    started = time.perf_counter()
    load_dataset(data)
    cold = time.perf_counter() - started
    benchmark.pedantic(load_dataset, args=(data,), rounds=5)
    benchmark.extra_info["ratio"] = benchmark.stats.stats.min / cold
    assert benchmark.stats.stats.min < cold / 10


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`model1` with random weights, exported."""
    from export.onnx import save_onnx, to_onnx

    root = tmp_path_factory.mktemp("exported")
    trial = Trial(architecture="model1")
    network = build_network(trial, 10, 32).eval()
    entry = {"precision": "float32", "input": {"normalized": True}}
    save_onnx(to_onnx(network, torch.randn(2, 3, 32, 32), 20), root / "model.onnx", 20)
    onnx_entry = {"format": "onnx", "sha256": storage.sha256(root / "model.onnx")}
    manifest = Manifest(
        id="x",
        config=trial.model_dump(mode="json"),
        weights_sha256=checkpoints.save_weights(root / "model.safetensors", network.state_dict()),
        classes=[str(i) for i in range(10)],
        input_size=32,
        files={
            "model.safetensors": FileEntry.model_validate(entry | {"format": "torch"}),
            "model.onnx": FileEntry.model_validate(entry | onnx_entry),
        },
    )
    return SimpleNamespace(root=root, manifest=manifest, network=network)


def test_export(benchmark, exported, tmp_path):
    from export.onnx import save_onnx, to_onnx

    example = torch.randn(2, 3, 32, 32)
    benchmark.pedantic(lambda: save_onnx(to_onnx(exported.network, example, 20), tmp_path / "m.onnx", 20), rounds=2)


@pytest.mark.parametrize("name", plugins.names("export.runtimes"))
def test_inference(benchmark, exported, name):
    from export.runtimes import Unavailable

    kind = plugins.load("export.runtimes", name, "FORMAT")
    file = next((f for f, entry in exported.manifest.files.items() if entry.format == kind), None)
    if file is None:
        pytest.skip("is not exported here")
    artifact = Artifact(exported.root, exported.manifest, file)
    try:
        predict = plugins.load("export.runtimes", name, "load")(artifact, DEVICE.type, torch.get_num_threads())
    except Unavailable as reason:
        pytest.skip(str(reason))
    images = np.random.default_rng(0).normal(size=(BATCH, 3, 32, 32)).astype(np.float32)
    timing.warm_up(lambda: predict(images))
    benchmark.extra_info["images"] = BATCH
    benchmark.pedantic(predict, args=(images,), rounds=20)


def test_onnxruntime_is_not_far_behind_eager(benchmark, exported):
    """Less than twice eager's time on `model1` (ReLU, fast in both), in interleaved rounds of one process."""
    images = np.random.default_rng(0).normal(size=(BATCH, 3, 32, 32)).astype(np.float32)
    calls = {}
    for name, file in (("torch_eager", "model.safetensors"), ("onnxruntime", "model.onnx")):
        load = plugins.load("export.runtimes", name, "load")
        predict = load(Artifact(exported.root, exported.manifest, file), "cpu", torch.get_num_threads())
        calls[name] = lambda predict=predict: predict(images)
    rounds = benchmark.pedantic(timing.interleave, args=(calls, 10, 0.05, 0), rounds=1)
    seconds = {name: np.median([r.seconds / r.calls for r in rounds if r.arm == name]) for name in calls}
    benchmark.extra_info["ratio"] = seconds["torch_eager"] / seconds["onnxruntime"]
    assert seconds["onnxruntime"] < 2 * seconds["torch_eager"]


# A typical onnxruntime loop, with the session options that runtimes/onnxruntime.py sets.
BARE = """
import sys, time
import numpy as np, onnxruntime
model, images, threads = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
options.add_session_config_entry("session.force_spinning_stop", "1")
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
batches = np.split(np.load(images), 8)
for line in sys.stdin:
    before = time.perf_counter()
    for number in range(int(line)):
        session.run(None, {"images": batches[number % 8]})
    print(time.perf_counter() - before, flush=True)
"""


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_reported_throughput_is_that_of_a_bare_loop(benchmark, exported, tmp_path, batch_size):
    """The inference benchmark's arm against a loop over InferenceSession.run: one process each, interleaved.

    Five pairs of processes: the placement of its memory makes a process up to 3 % faster or slower for its lifetime.
    """
    images = np.random.default_rng(0).normal(size=(8 * batch_size, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    exported.manifest.write(tmp_path / "manifest.json")
    (tmp_path / "model.onnx").write_bytes((exported.root / "model.onnx").read_bytes())
    order, ratios = random.Random(0), list[float]()
    benchmark.pedantic(lambda: ratios.append(reported_over_bare(exported, tmp_path, batch_size, order)), rounds=5)
    middle = float(np.median(ratios))
    benchmark.extra_info["throughput_as_reported_over_bare"] = middle
    assert 0.97 < middle < 1.03


def reported_over_bare(exported, folder: Path, batch_size: int, order: random.Random) -> float:
    """Ratio of reported to bare throughput: the median over rounds of one pair of processes."""
    threads = torch.get_num_threads()
    check = Check(Artifact(folder, exported.manifest, "model.onnx"), "onnxruntime", "cpu")
    command = [sys.executable, "-c", BARE, str(folder / "model.onnx"), str(folder / "images.npy"), str(threads)]
    ratios = list[float]()
    with (
        ArmProcess(Arm("onnxruntime", check, "float32"), threads, folder / "images.npy", folder / "log") as worker,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bare,
    ):
        assert bare.stdin is not None and bare.stdout is not None
        answers = str(folder / "answers.npy")
        worker.ask("answers", to=answers, batch_size=batch_size)
        warm = worker.ask("warm_up", batch_size=batch_size, answers=answers)
        calls = max(8, round(0.3 / warm["call_seconds"]))
        for _ in range(6):
            taken: dict[str, float] = {}
            for name in order.sample(["ours", "bare"], 2):
                if name == "ours":
                    taken[name] = sum(worker.ask("measure", calls=calls)["seconds"])
                else:
                    print(calls, file=bare.stdin, flush=True)
                    taken[name] = float(bare.stdout.readline())
            ratios.append(taken["bare"] / taken["ours"])
        bare.stdin.close()
    return float(np.median(ratios[1:]))  # without the round that warms up the bare loop


@pytest.mark.parametrize(
    "module", ["harness.tune", "harness.report", "export", "export.predict", "benchmarks", "architectures"]
)
def test_start_up(benchmark, module):
    """Start-up time of each command: `--help` in a fresh process."""
    top = Path(__file__).parent.parent

    def start(*arguments: str):
        subprocess.run([sys.executable, *arguments], cwd=top, check=True, stdout=subprocess.DEVNULL)

    benchmark.pedantic(start, args=("-m", module, "--help"), rounds=3)
    assert benchmark.stats.stats.min < 1.5
