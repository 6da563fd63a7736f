"""What results say of GPUs, what counts as one, and settings of PyTorch that a GPU's use leaves behind."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import TOP, asks_for_gpu, command
from networks import network
from torch import nn

from benchmarks.arms.measure import trials_at_once
from benchmarks.arms.plain_loop import precision
from benchmarks.arms.summary import summarize_arms
from export.onnx import to_onnx
from harness.config import Resources
from harness.run import gpus, system
from harness.training.compilation import to_device

CUDA = torch.device("cuda", 0)


class Nvml:
    """pynvml on a machine with two GPUs, one of which does not tell its power limit."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, names=("NVIDIA H100 80GB HBM3",) * 2):
        self.names, self.open = names, 0
        self.lost, self.mig = set[int](), None

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return "580.159.04"

    def nvmlDeviceGetCount(self):
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index in self.lost:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetMigMode(self, handle):
        if self.mig is None:
            raise self.NVMLError("not supported")
        return [self.mig, self.mig]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetName(self, handle):
        return self.names[handle]

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=80 << 30)

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return 100 * clock

    def nvmlDeviceGetMaxClockInfo(self, handle, clock):
        return 1000 * clock

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        if handle == 1:
            raise self.NVMLError("not supported")
        return 700_000


@pytest.fixture
def nvml(monkeypatch):
    """Two GPUs that PyTorch uses too."""
    there = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", there)
    monkeypatch.setattr(gpus, "usable", lambda: 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", uuid="1", total_memory=79 << 30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    gpus.common_name.cache_clear()
    yield there
    gpus.common_name.cache_clear()
    assert there.open == 0


def test_results_say_which_gpus(nvml):
    told = gpus.describe_all()
    assert (told["count"], told["driver"], told["cuda"]) == (2, "580.159.04", torch.version.cuda)
    assert told["cudnn"] == torch.backends.cudnn.version()
    first, second = told["devices"]
    assert first == {
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": "GPU-0",
        "memory_bytes": 80 << 30,
        "sm_mhz": 100,
        "sm_mhz_max": 1000,
        "memory_mhz": 200,
        "memory_mhz_max": 2000,
        "power_limit_watts": 700.0,
    }
    assert second["power_limit_watts"] is None


def test_a_trial_says_which_one(nvml):
    told = gpus.describe(CUDA)
    assert (told["uuid"], told["memory_bytes"], told["driver"]) == ("GPU-1", 79 << 30, "580.159.04")
    assert told["sm_mhz_max"] == 1000


def test_where_nvml_is_missing_that_is_told(nvml, monkeypatch):
    """The real library, which finds no driver."""
    monkeypatch.delitem(sys.modules, "pynvml")
    import pynvml

    def absent():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert gpus.describe_all()["nvml"] == "NVML Shared Library Not Found"
    told = gpus.describe(CUDA)
    assert (told["name"], told["nvml"]) == ("NVIDIA H100 80GB HBM3", "NVML Shared Library Not Found")
    assert gpus.common_name() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "ModuleNotFoundError" in gpus.describe_all()["nvml"]


def test_a_name_that_all_share(nvml):
    assert gpus.common_name() == "NVIDIA H100 80GB HBM3"
    gpus.common_name.cache_clear()
    nvml.names = ("NVIDIA H100 80GB HBM3", "NVIDIA A2")
    assert gpus.common_name() is None


@pytest.mark.parametrize(("mig", "found"), [(0, "NVIDIA H100 80GB HBM3"), (1, None)])
def test_a_divided_gpu_is_not_what_its_parts_are(nvml, mig, found):
    nvml.mig = mig
    assert gpus.common_name() == found


def test_a_lost_gpu_does_not_end_a_command(nvml):
    nvml.lost = {0}
    assert [device["uuid"] for device in gpus.describe_all()["devices"]] == ["GPU-1"]
    assert gpus.common_name() is None


def test_a_gpu_whose_driver_is_too_old_is_none(monkeypatch):
    """NVML counts it, CUDA does not."""
    monkeypatch.setattr(gpus, "DEVICES", ("null",))  # /dev/null is there
    monkeypatch.setattr("torch.cuda._device_count_nvml", lambda: 1)
    assert gpus.usable() == 0


def test_gpus_that_pytorch_cannot_use_are_told(nvml, monkeypatch):
    monkeypatch.setattr(gpus, "usable", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.unusable().startswith(f"2 NVIDIA GPUs are here, but PyTorch {torch.__version__} for CUDA")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert gpus.unusable().endswith("cannot use them; CUDA_VISIBLE_DEVICES=7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.unusable() == ""


def test_without_a_gpu_nothing_is_said():
    assert gpus.usable() == 0
    assert system.environment().gpus == {}
    assert gpus.peak_memory(torch.device("cpu")) == {}


def test_peak_memory(monkeypatch):
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 5)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda device: 7)
    assert gpus.peak_memory(CUDA) == {"peak_allocated_bytes": 5, "peak_reserved_bytes": 7}


@pytest.mark.parametrize(("gpus_per_trial", "device"), [(None, "auto"), (0, "cpu"), (0.5, "auto")])
def test_where_no_gpu_is_wanted_none_is_used(gpus_per_trial, device):
    """Also by what the driver does of trials itself: reading the test set, estimates."""
    assert Resources(gpus_per_trial=gpus_per_trial).device == device


def test_export_works_after_a_network_was_on_a_gpu():
    """PyTorch's export reads settings that raise once they were set in another way (pytorch issue 179445)."""
    to_device(nn.Identity(), CUDA)  # has nothing that would need a GPU
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert to_onnx(network("baseline"), torch.randn(2, 3, 32, 32), 20).graph.node


def test_advice_against_what_was_decided_is_no_error():
    """PyTorch 2.11 warns so where torch.compile meets float32 on a GPU; warnings are errors here."""
    to_device(nn.Identity(), CUDA)
    warnings.warn(
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled.", stacklevel=1
    )
    with pytest.raises(UserWarning):
        warnings.warn("something else", stacklevel=1)


@pytest.mark.parametrize(("capability", "found"), [((9, 0), "tf32"), ((7, 5), "float32")])
def test_what_a_plain_script_computes_in(monkeypatch, capability, found):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
    assert precision(CUDA) == found
    assert precision(torch.device("cpu")) == "float32"


def test_utilisation_is_of_the_rate_that_an_arm_can_reach():
    """A plain script's convolutions are TF32: of the float32 rate it would reach eight times as much."""
    row = {"arm": "plain", "trials_per_hour": 36.0, "step_images_per_second": 1000.0, "first_result_seconds": 1.0}
    row |= {"peak_bytes": 2**30, "peak_device_bytes": 2**31, "plan": "", "val_accuracy": [0.5, 0.6]}
    rows = [row | {"precision": "tf32"}, row | {"precision": "tf32"}]
    rows += [{**one, "arm": "harness", "precision": "float16"} for one in rows]
    rates = {"float32": 5e13, "tf32": 4e14, "bfloat16": 8e14, "float16": 7e14}
    found = summarize_arms(rows, {"training": 8e10, "trial": 1e16}, rates).set_index("arm")
    assert found.loc["plain", "mfu_step"] == pytest.approx(0.2)
    assert found.loc["plain", "mfu_trial"] == pytest.approx(0.25)
    assert found.loc["harness", "mfu_step"] == pytest.approx(8e13 / 7e14)
    assert pd.Series(found["peak_device_gib"]).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("arm", "trials", "threads", "found"),
    [("harness", 4, 4, 1), ("harness_8", 8, 2, 8), ("harness_8", 2, 2, 2), ("harness_8", 8, 8, 2), ("plain", 4, 1, 1)],
)
def test_how_many_trials_share_a_gpu(arm, trials, threads, found):
    """No more than there are, nor than the cores let run at once."""
    assert trials_at_once(arm, [{"device": "cuda", "cores": 16, "threads": threads}] * trials) == found


def test_a_worker_compiles_with_its_own_threads():
    """PyTorch reads these settings once, when its compiler is imported."""
    settings = "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_VEC_ISA_OK"
    lines = [
        f"import os; [os.environ.pop(name, None) for name in {settings}]",
        "from harness.search.worker import TrialWorker, own_paths",
        "worker = object.__new__(TrialWorker)",
        "worker.start = lambda *_: None",
        "worker.setup({'threads': 3, 'paths': own_paths()})",
        "import torch._inductor.config as config",
        "print(config.compile_threads, config.cpp.vec_isa_ok)",
    ]
    done = command("-c", "\n".join(lines), cwd=TOP, TORCHINDUCTOR_CACHE_DIR="/nowhere")
    assert done.stdout.split() == ["3", "True"], done.stderr


@pytest.mark.parametrize(
    ("expression", "found"),
    [("not slow", False), ("slow", False), ("gpu", True), ("gpu and not slow", True), ("not gpu", False), ("", False)],
)
def test_tests_use_a_gpu_where_they_are_asked_to(expression, found):
    assert asks_for_gpu(expression) == found


@pytest.mark.slow
@pytest.mark.cifar10
def test_what_measures_on_a_gpu_runs(tmp_path, cifar10_folder):
    """benchmarks/gpu.sh with little work, as far as it takes a minute; an unknown step costs the others nothing."""
    environment = {"SMALL": "1", "OUT": str(tmp_path), "DATA": str(cifar10_folder), "PYTHON": sys.executable}
    steps = ["machine", "nothing", "tests", "plans", "trial", "export"]
    done = subprocess.run(
        ["bash", str(TOP / "benchmarks" / "gpu.sh"), *steps],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    table = pd.read_csv(tmp_path / "steps.csv").set_index("step")
    assert table["exit_code"].to_dict() == {step: 2 if step == "nothing" else 0 for step in steps}, done.stdout
    assert list(tmp_path.glob("run/exported/*/model_fp16.onnx"))
    assert (tmp_path / "plans.json").is_file()
