"""The plan: by rule, as measured, and what may not be chosen."""

import pytest
import torch

from harness import datasets, execution, kernels
from harness.config import Data, Trial
from harness.errors import BadInput
from harness.execution import Plan, candidates, choose, remembered
from harness.trial import Job, train

CPU = torch.device("cpu")
SMALL = {"architecture": "final", "options": {"widths": [[4, 8], [8, 8]], "hidden": [16]}, "batch_size": 16}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))


def test_the_configuration_comes_before_what_was_measured():
    chosen = {"compile": "kernels", "memory_format": "channels_last"}
    assert Plan.of(Trial(), CPU, chosen).compile == "kernels"
    assert Plan.of(Trial(compile="off", memory_format="contiguous"), CPU, chosen).name == "off contiguous"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "float16"}, r"trial\.precision=float16: needs a CUDA device"),
        ({"compile": "captured"}, r"trial\.compile=captured: needs a CUDA device"),
        ({"compile": "kernels", "memory_format": "contiguous"}, r"trial\.compile=kernels"),
    ],
)
def test_what_the_device_cannot_do_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        Plan.of(Trial(**changes), CPU)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BadInput, match=r"trial\.compile=default: no C\+\+ compiler"):
        Plan.of(Trial(compile="default"), CPU)
    assert Plan.of(Trial(), CPU).compile == "off"
    assert {plan.compile for plan in candidates(Trial(), CPU)} == {"off"}


def test_candidates_leave_what_is_fixed():
    names = [plan.name for plan in candidates(Trial(), CPU)]
    assert names == ["off channels_last", "kernels channels_last", "default channels_last", "off contiguous"]
    assert [p.name for p in candidates(Trial(compile="off"), CPU)] == ["off channels_last", "off contiguous"]
    fixed = candidates(Trial(memory_format="contiguous", precision="float32"), CPU)
    assert [p.name for p in fixed] == ["off contiguous", "default contiguous"]
    assert {p.precision for p in fixed} == {"float32"}


def test_chosen_once_and_remembered():
    trial = Trial(**SMALL)
    choice = choose(trial, 10, 16, CPU, images=1000)
    assert choice["compile"] == "off"
    assert all("may cost" in reason for reason in choice["left_out"].values())  # 1,000 images pay for no compilation
    assert choice["precision"] == Plan.of(trial, CPU).precision
    assert remembered(trial, 10, 16, CPU, 1000) == choice | {"from_cache": True}
    assert remembered(trial, 10, 16, CPU, 1e9) is None
    assert remembered(Trial(**SMALL | {"batch_size": 8}), 10, 16, CPU, 1000) is None
    same_shape = Trial(**SMALL, optimizer={"lr": 0.3}, epochs=3)
    assert remembered(same_shape, 10, 16, CPU, 1000) is not None


def test_a_candidate_that_computes_something_else_is_left_out(monkeypatch):
    """A planted fault: Mish with its sign wrong for negative numbers."""
    wrong = (lambda x: x.abs(), lambda x: x.sign())
    monkeypatch.setitem(kernels.ACTIVATIONS, torch.nn.Mish, wrong)
    monkeypatch.setattr(kernels.Fused, "known", {})
    with torch.compiler.set_stance("force_eager"):
        choice = choose(Trial(**SMALL, precision="float32"), 10, 16, CPU, images=1e9)
    assert "are not those of eager" in choice["left_out"]["kernels channels_last"]
    assert choice["compile"] != "kernels"


def test_a_candidate_that_fails_is_left_out(monkeypatch):
    def fails(network):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(kernels, "fuse", fails)
    with torch.compiler.set_stance("force_eager"):
        choice = choose(Trial(**SMALL), 10, 16, CPU, images=1e9)
    assert choice["left_out"]["kernels channels_last"] == "RuntimeError: no such instruction"


def test_a_trial_follows_the_plan_it_is_given(digits, tmp_path):
    datasets.load(digits)
    trial = Trial(**SMALL, epochs=1, precision="float32")
    plan = {"compile": "off", "memory_format": "contiguous"}
    record = train(Job(trial, digits, plan=plan))
    assert record["environment"]["memory_format"] == "contiguous"
    with torch.compiler.set_stance("force_eager"):
        fused = train(Job(trial, digits, plan={"compile": "kernels"}))
    assert fused["environment"]["compile"] == "kernels"
    assert fused["metrics"]["train_loss"] == pytest.approx(record["metrics"]["train_loss"], rel=1e-3)


def test_process_settings_keep_results(digits):
    trial = Trial(**SMALL, epochs=1)
    before = train(Job(trial, digits))
    execution.prepare_process()
    assert train(Job(trial, digits))["metrics"] == before["metrics"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("optimizer", [{"name": "sgd", "momentum": 0.9}, {"name": "adam", "lr": 1e-3}])
def test_captured_is_the_same_training(digits, optimizer):
    """The whole step as a CUDA graph against the same step launched kernel by kernel."""
    trial = {**SMALL, "epochs": 2, "precision": "float32", "optimizer": optimizer}
    eager, captured = (
        train(Job(Trial(**trial, compile=mode), Data(name="digits", limit=20))) for mode in ("default", "captured")
    )
    assert captured["environment"]["compile"] == "captured"
    assert captured["metrics"]["train_loss"] == pytest.approx(eager["metrics"]["train_loss"], rel=2e-2)
