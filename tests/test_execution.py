"""The plan: by rule, as measured, and what may not be chosen."""

import pytest
import torch
from conftest import run_record
from safetensors.torch import load_file

from harness.config import BadInput, Data, Trial
from harness.cpu_kernels import functions
from harness.data.dataset import load_dataset
from harness.run import storage
from harness.run.directory import RunDirectory
from harness.run.progress import Progress
from harness.run.records import WEIGHTS_FILE, PlanChoice
from harness.search import plans as search_plans
from harness.search.plans import Placement, choose_plans, eager_seconds
from harness.training import autotuner, compilation, execution
from harness.training.autotuner import cached_choice, candidate_plans, choose_plan
from harness.training.execution import ExecutionPlan
from harness.training.job import TrainingJob
from harness.training.loop import train_job

CPU = torch.device("cpu")
SMALL = {"architecture": "final", "options": {"widths": [[4, 8], [8, 8]], "hidden": [16]}, "batch_size": 16}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    monkeypatch.setattr(autotuner, "ROUNDS", 1)  # what is fastest is not the question here
    monkeypatch.setattr(
        autotuner, "LEAST_SECONDS", 30.0
    )  # enough for the kernels on a slow machine, not for torch.compile


def test_the_configuration_comes_before_what_was_measured():
    assert ExecutionPlan.of(Trial(), CPU, measured()).name == "kernels channels_last"
    assert ExecutionPlan.of(Trial(), CPU, measured()).source == "measured"
    assert ExecutionPlan.of(Trial(plan="rule"), CPU, measured()).name == "off channels_last"
    assert ExecutionPlan.of(Trial(compile="off", memory_format="contiguous"), CPU, measured()).name == "off contiguous"
    assert ExecutionPlan.of(Trial(memory_format="contiguous"), CPU, measured()).name == "off contiguous"


def measured(**changes):
    """What `choose` may have found for this process."""
    rule = vars(ExecutionPlan.of(Trial(), CPU))
    return PlanChoice(**(rule | {"compile": "kernels", "memory_format": "channels_last"} | changes))


@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"threads": 99}, {"precision": "float16"}])
def test_what_was_measured_elsewhere_does_not_count(changes):
    plan = ExecutionPlan.of(Trial(), CPU, measured(**changes))
    assert plan == ExecutionPlan.of(Trial(), CPU)
    assert plan.source.startswith("rule: measured with")


def test_a_node_without_a_compiler_goes_by_rule(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert ExecutionPlan.of(Trial(), CPU, measured()).source == "rule: no compiler here for kernels"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "float16"}, r"trial\.precision=float16: needs a CUDA device"),
        ({"compile": "captured"}, r"trial\.compile=captured: needs a CUDA device"),
        ({"compile": "captured-eager"}, r"trial\.compile=captured-eager: needs a CUDA device"),
        ({"compile": "kernels", "memory_format": "contiguous"}, r"trial\.compile=kernels"),
    ],
)
def test_what_the_device_cannot_do_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        ExecutionPlan.of(Trial(**changes), CPU)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BadInput, match=r"trial\.compile=default: no C\+\+ compiler"):
        ExecutionPlan.of(Trial(compile="default"), CPU)
    assert ExecutionPlan.of(Trial(), CPU).compile == "off"
    assert {plan.compile for plan in candidate_plans(Trial(), CPU)} == {"off"}


def test_on_a_gpu_what_compiles_nothing_is_tried_first(monkeypatch):
    """By rule nothing is compiled there: a training may be over before that is."""
    cuda = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    assert ExecutionPlan.of(Trial(), cuda).name == "off channels_last"
    names = [plan.name for plan in candidate_plans(Trial(), cuda)]
    assert names[:4] == [f"{mode} channels_last" for mode in ("off", "captured-eager", "default", "captured")]
    assert names[4:] == ["off contiguous", "captured-eager contiguous"]
    fixed = candidate_plans(Trial(compile="captured-eager"), cuda)
    assert [plan.name for plan in fixed] == ["captured-eager channels_last", "captured-eager contiguous"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert {plan.compile for plan in candidate_plans(Trial(), cuda)} == {"off", "captured-eager"}
    assert ExecutionPlan.of(Trial(compile="captured-eager"), cuda).captured


def test_compilation_is_weighed_before_it_is_tried(monkeypatch):
    """Both plans of torch.compile cost more than 10 s; capturing alone does not."""
    monkeypatch.setattr(autotuner, "LEAST_SECONDS", 10.0)
    costs = autotuner.COMPILE_SECONDS
    assert all((max(costs[mode]) < 5) != execution.needs_compiler(mode) for mode in costs)
    monkeypatch.setitem(costs, "kernels", (11.0, 11.0))
    choice = choose_plan(Trial(**SMALL), 10, 16, CPU, images=1000)
    assert set(choice.left_out) == {"kernels channels_last", "default channels_last"}
    assert all("more than the limit for measuring" in reason for reason in choice.left_out.values())


def test_planned_training_is_measured_for_where_it_takes_long_enough():
    """On a GPU a small network's steps take what launching their kernels takes: 10 epochs of CIFAR-10 are enough."""
    macs, images = 138_000_000, 450_000  # final
    assert eager_seconds("cuda", macs, images, 64) > search_plans.MEASURED_FROM_SECONDS
    assert eager_seconds("cuda", macs, images // 10, 64) < search_plans.MEASURED_FROM_SECONDS
    assert eager_seconds("cuda", 100 * macs, images // 10, 64) > search_plans.MEASURED_FROM_SECONDS
    assert eager_seconds("cpu", macs, images // 10, 64) > search_plans.MEASURED_FROM_SECONDS
    assert eager_seconds("cpu", macs // 100, images // 10, 64) < search_plans.MEASURED_FROM_SECONDS


def test_a_plan_known_from_the_cache_starts_nothing_on_a_gpu(tmp_path):
    """Its name, which the driver tells without touching it, is enough to find what was measured on it."""
    trial, name, threads = Trial(**SMALL, epochs=100_000), "NVIDIA H100 80GB HBM3", 4
    choice = {"compile": "captured-eager", "memory_format": "contiguous", "images": 1e12, "short_of_time": False}
    file = autotuner._cache_file(trial, 10, 16, name, threads)
    storage.write_json(file, choice | {"images_per_second": {"captured-eager contiguous": 1e5}})
    run = RunDirectory(tmp_path / "run")
    run.create(run_record(), "command")

    def elsewhere(*_):
        raise AssertionError("a process was started")

    plans = choose_plans([trial], 8, run, Placement("cuda", threads, 1, name), Progress(), elsewhere)
    assert plans["final"].compile == "captured-eager"
    assert plans["final"].from_cache
    other = RunDirectory(tmp_path / "other")
    other.create(run_record(), "command")
    plans = choose_plans([trial], 8, other, Placement("cuda", threads, 1, None), Progress(), elsewhere)
    assert plans["final"].by_rule == "a process was started"


def test_candidates_leave_what_is_fixed():
    names = [plan.name for plan in candidate_plans(Trial(), CPU)]
    assert names == ["off channels_last", "kernels channels_last", "default channels_last", "off contiguous"]
    assert [p.name for p in candidate_plans(Trial(compile="off"), CPU)] == ["off channels_last", "off contiguous"]
    fixed = candidate_plans(Trial(memory_format="contiguous", precision="float32"), CPU)
    assert [p.name for p in fixed] == ["off contiguous", "default contiguous"]
    assert {p.precision for p in fixed} == {"float32"}


def test_chosen_once_and_remembered():
    trial = Trial(**SMALL)
    choice = choose_plan(trial, 10, 16, CPU, images=1000)
    assert ExecutionPlan.of(trial, CPU, choice).source == "measured"
    assert choose_plan(trial.model_copy(update={"compile": "kernels"}), 10, 16, CPU, 1000).to_json().keys() == {
        "by_rule"
    }
    assert list(choice.left_out) == ["default channels_last"]  # 1,000 images do not pay for its compilation
    assert "may take" in choice.left_out["default channels_last"]
    assert choice.precision == ExecutionPlan.of(trial, CPU).precision
    here = execution.processor_name(CPU), torch.get_num_threads()

    def known(trial, images, machine=here[0]):
        return cached_choice(trial, 10, 16, machine, images, here[1])

    assert known(trial, 1000).to_json() == choice.to_json() | {"from_cache": True}
    assert known(trial, 1e9) is None
    assert known(trial, 1000, "another CPU") is None
    assert known(Trial(**SMALL | {"batch_size": 8}), 1000) is None
    assert known(Trial(**SMALL, optimizer={"lr": 0.3}, epochs=3), 1000) is not None


FAULTS = {
    "none": {},
    "Mish is ReLU": {"Mish_pool": "ReLU_pool"},
    "derivative of ReLU": {"Mish_pool_backward": "ReLU_pool_backward"},
    "tiles of other pixels": {"winograd_correlate_3": "padding"},
    "filters not turned": {"winograd_filters_3": "turned"},
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_candidate_that_computes_something_else_is_left_out(monkeypatch, precision, fault):
    """Planted faults in the kernels; without one the candidate stays."""
    right, other = functions.call, FAULTS[fault]

    def wrong(name, *arguments):
        kind, _, dtype = name.rpartition("_")
        if other.get(name) == "turned":  # the last argument
            arguments = (*arguments[:-1], 0)
        elif other.get(name) == "padding":  # the one before the last
            arguments = (*arguments[:-2], 0, arguments[-1])
        elif kind in other:
            name = f"{other[kind]}_{dtype}"
        right(name, *arguments)

    monkeypatch.setattr(functions, "call", wrong)
    trial = {"architecture": "final", "options": {"widths": [[4, 32], [64, 64]], "hidden": [16]}, "batch_size": 16}
    choice = choose_plan(
        Trial(**trial, compile="auto", memory_format="channels_last", precision=precision), 10, 16, CPU, 1e4
    )
    harmless = fault == "none" or (precision == "bfloat16" and "winograd" in next(iter(other)))  # that is for float32
    assert ("kernels channels_last" in choice.images_per_second) == harmless
    assert harmless or "computes something else" in choice.left_out["kernels channels_last"]


def test_dropout_does_not_disturb_the_comparison():
    trial = Trial(architecture="model1", options={"widths": [8, 8], "dropout": 0.5}, batch_size=16, precision="float32")
    with torch.compiler.set_stance("force_eager"):
        choice = choose_plan(trial, 10, 16, CPU, images=1e9)
    assert not choice.left_out
    assert len(choice.images_per_second) == 4


def test_a_candidate_that_fails_is_left_out(monkeypatch):
    def fails(network):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compilation, "fuse", fails)
    choice = choose_plan(Trial(**SMALL), 10, 16, CPU, images=1000)
    assert choice.left_out["kernels channels_last"] == "RuntimeError: no such instruction"


def test_a_trial_follows_the_plan_it_is_given(digits, tmp_path):
    load_dataset(digits)
    trial = Trial(**SMALL, epochs=1, precision="float32")
    plan = measured(precision="float32")
    record = train_job(
        TrainingJob(trial, digits, plan=plan.model_copy(update={"compile": "off", "memory_format": "contiguous"}))
    )
    assert record.environment.memory_format == "contiguous"
    assert record.environment.source == "measured"
    fused = train_job(TrainingJob(trial, digits, plan=plan))
    assert fused.environment.compile == "kernels"
    assert fused.metrics.train_loss == pytest.approx(record.metrics.train_loss, rel=1e-3)


def test_process_settings_keep_results(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "2")
    trial = Trial(**SMALL, epochs=1)
    before = train_job(TrainingJob(trial, digits))
    execution.prepare_process(torch.get_num_threads())
    assert train_job(TrainingJob(trial, digits)).metrics == before.metrics


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(
    "optimizer",
    [{"name": "sgd"}, {"name": "sgd", "momentum": 0.9}, {"name": "adam", "lr": 1e-3}, {"name": "adamw", "lr": 1e-3}],
)
def test_captured_is_the_same_training(digits, tmp_path, optimizer, precision):
    """The whole step as a CUDA graph against the same step launched kernel by kernel: weights after two epochs."""
    schedule = {"schedule": {"name": "one_cycle"}, "gradient_clip": 1.0, "augmentation": {"flip": True}, "keep": "last"}
    # A bias before batch norm has no gradient but for rounding, by whose size Adam divides it.
    options = {**SMALL["options"], "batch_norm": "none"}
    trial = {**SMALL, **schedule, "options": options, "epochs": 2, "precision": precision, "optimizer": optimizer}
    weights = {}
    for mode in ("default", "captured", "captured-eager"):
        record = train_job(
            TrainingJob(Trial(**trial, compile=mode), Data(name="digits", limit=20), folder=tmp_path / mode)
        )
        assert record.environment.compile == mode
        weights[mode] = load_file(tmp_path / mode / WEIGHTS_FILE)
    for mode in ("captured", "captured-eager"):
        for name, tensor in weights["default"].items():
            tolerance = 1e-3 if precision == "float32" else 3e-2
            assert torch.allclose(tensor.float(), weights[mode][name].float(), atol=tolerance, rtol=tolerance), name
