"""The training step for a GPU, on a machine without one: where its tensors are, what it waits for, what a CUDA graph
of it would replay."""

import pytest
import stand_ins
import torch
from stand_ins import CUDA
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.config import Trial, plugins
from harness.data.augmentation import Draws
from harness.data.batches import DeviceSplit, Normalizer
from harness.training import step
from harness.training.compilation import to_device
from harness.training.evaluation import Evaluation
from harness.training.execution import ExecutionPlan
from harness.training.network import build_network
from harness.training.step import CapturedStep, Step

NETWORKS = plugins.names("architectures")
SMALL = {
    "baseline": {"widths": [4, 8], "hidden": [8], "kernel_size": 3},
    "model1": {"widths": [4, 8], "hidden": [8]},
    "model2": {"widths": [4, 8], "hidden": [8]},
    # A bias before batch norm has no gradient but for rounding, by whose size Adam divides it; others have batch norm.
    "final": {"widths": [[4, 4], [8, 8]], "hidden": [8], "batch_norm": "none"},
    "transfer": {"resize": 0, "frozen": ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]},
}
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    "adam": {"name": "adam", "lr": 1e-3},
    "adamw": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
}
PRECISIONS = ["float32", "bfloat16", "float16"]
AUGMENTATIONS = {False: {}, True: {"flip": True, "crop_padding": 2}}
BATCH = 4


def combination(name: str, optimizer: str, precision: str):
    """By default every network with one optimiser, and one network with all."""
    is_slow = name != "baseline" and optimizer != "adam"
    return pytest.param(name, optimizer, precision, marks=[pytest.mark.slow] if is_slow else [])


every_combination = pytest.mark.parametrize(
    ("name", "optimizer", "precision"),
    [
        combination(name, optimizer, precision)
        for name in NETWORKS
        for optimizer in OPTIMIZERS
        for precision in PRECISIONS
    ],
)


def trial_of(name: str, optimizer: str, precision: str, augmented: bool = True, **changes) -> Trial:
    fixed = {"batch_size": BATCH, "label_smoothing": 0.1, "gradient_clip": 0.5, "options": SMALL.get(name, {})}
    chosen = {"optimizer": OPTIMIZERS[optimizer], "precision": precision, "augmentation": AUGMENTATIONS[augmented]}
    return Trial.model_validate({"architecture": name, **fixed, **chosen, **changes})


def part_on(device: torch.device) -> DeviceSplit:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)
    return DeviceSplit(images.to(device), labels.to(device), torch.arange(16).to(device))


SCALER = {"scale": 2.0**16, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}


def train_on_fake_cuda(patch: pytest.MonkeyPatch, trial: Trial, tensor_rate: bool, planted: nn.Module | None = None):
    """Two steps, an evaluation, and two more of a step that goes on from the first one's state."""
    stand_ins.fake_cuda(patch)
    plan = ExecutionPlan("cuda", trial.precision, "off", "channels_last", 1)
    with FakeTensorMode():
        part = part_on(CUDA)

        def made() -> Step:
            network = build_network(trial, 10, 32)
            if planted is not None:
                network = nn.Sequential(network, planted)
            network = stand_ins.to_fake_cuda(network).train()
            stand_ins.make_up_gradients(patch, network)
            return Step(network, network, Normalizer(trial.normalization, CUDA), trial, plan, CUDA)

        def train(one: Step) -> torch.Tensor:
            draws = Draws.of(part.rows, trial, 0)
            sums = torch.zeros(2, device=CUDA)
            for number in range(2):
                batch = draws.batch(number, BATCH)
                if tensor_rate:  # as a step that is captured
                    for group in one.optimizer.param_groups:
                        group["lr"] = torch.zeros((), device=CUDA)
                    sums += one.compute(*part.batch(batch.rows), batch)
                else:
                    sums += one(part, batch, 1e-3)
            return sums

        first = made()
        assert train(first).device == CUDA
        for logits, labels in Evaluation(first.network, first.normalize, CUDA).logits(part, plan.precision):
            assert (logits.device, labels.device, logits.dtype) == (CUDA, CUDA, torch.float32)
        saved = {name: tensor.cpu() for name, tensor in first.state().items()}
        second = made()
        second.restore(saved, SCALER)
        assert {name: (t.device, t.stride()) for name, t in second.state().items()} == {
            name: (t.device, t.stride()) for name, t in first.state().items()
        }
        train(second)


@every_combination
def test_all_of_a_step_is_on_the_device(monkeypatch, name, optimizer, precision):
    """Nothing is left on the CPU, nothing waits for the device, fused optimisers get what their kernels demand."""
    for augmented in (False, True):
        train_on_fake_cuda(monkeypatch, trial_of(name, optimizer, precision, augmented), tensor_rate=augmented)


class LeftOnTheCpu(nn.Module):
    def forward(self, logits):
        return logits + torch.zeros(10)


class Waits(nn.Module):
    def forward(self, logits):
        return logits / max(1.0, logits.abs().max().item())


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        (LeftOnTheCpu(), "at least two devices, cuda:0 and cpu|two different devices cuda:0, cpu"),
        (Waits(), "_local_scalar_dense"),
    ],
)
def test_a_fault_planted_on_the_device_is_caught(monkeypatch, planted, told):
    with pytest.raises(Exception, match=told):
        train_on_fake_cuda(monkeypatch, trial_of("baseline", "sgd", "float32"), False, planted)


def test_an_optimiser_state_in_another_layout_is_caught(monkeypatch):
    """Of a checkpoint that was restored without its parameter's memory layout."""
    monkeypatch.setattr(step.torch, "empty_like", lambda tensor: torch.empty(tensor.shape, device=tensor.device))
    with pytest.raises(AssertionError):
        train_on_fake_cuda(monkeypatch, trial_of("baseline", "adam", "float32"), False)


def trained(
    kind: type[Step], trial: Trial, steps: int = 4, resumed_at: int | None = None, started_over_at: int | None = None
):
    """(sums after each step, state and scale of the loss at the end), the learning rate changing from step to step."""
    plan = ExecutionPlan("cpu", trial.precision, "off", "channels_last", 1)
    part, cpu = part_on(torch.device("cpu")), torch.device("cpu")
    draws = Draws.of(part.rows, trial, 3)

    def made() -> Step:
        torch.manual_seed(0)
        network = to_device(build_network(trial, 10, 32), cpu).train()
        one = kind(network, network, Normalizer(trial.normalization, cpu), trial, plan, cpu)
        if one.scaler.is_enabled():
            one.scaler.set_growth_interval(1)  # it doubles with each step
        return one

    one = made()
    torch.manual_seed(5)
    told, sums = [], torch.zeros(2)
    for number in range(steps):
        if number == resumed_at:
            state = {name: tensor.clone() for name, tensor in one.state().items()}
            scaler, random_state = one.scaler.state_dict(), torch.get_rng_state()
            one = made()
            one.restore(state, scaler)
            torch.set_rng_state(random_state)
        if number == started_over_at:
            one.start_over()
        sums += one(part, draws.batch(number, BATCH), trial.optimizer.lr / (number + 1))
        told.append(sums.tolist())
    return told, one.state() | {"scale": torch.tensor(one.scaler.get_scale())}


def assert_same(one, other, exactly: bool) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(one[0], other[0], **tolerance)
    torch.testing.assert_close(one[1], other[1], **tolerance)


@every_combination
def test_a_captured_step_trains_as_it_is_launched(monkeypatch, name, optimizer, precision):
    """Whatever changes from step to step is in tensors that a graph reads anew; also where a trial goes on."""
    stand_ins.recorded_graphs(monkeypatch)
    for augmented, resumed_at in ((False, None), (True, 2)):
        trial = trial_of(name, optimizer, precision, augmented)
        exactly = optimizer == "sgd"  # Adam computes with a tensor rate in another order
        assert_same(trained(CapturedStep, trial, resumed_at=resumed_at), trained(Step, trial), exactly)


def test_a_capture_in_the_middle_changes_nothing(monkeypatch):
    """Not the scale of the loss either, which has grown until then."""
    stand_ins.recorded_graphs(monkeypatch)
    trial = trial_of("baseline", "sgd", "float16")
    once, anew = (trained(CapturedStep, trial, started_over_at=at) for at in (None, 2))
    assert_same(anew, once, exactly=True)
    assert once[1]["scale"] > 2**16


class RateIsBakedIn(CapturedStep):
    def _capture(self, given, draws):
        for group in self.optimizer.param_groups:
            group["lr"] = self.trial.optimizer.lr
        super()._capture(given, draws)


class ReadsTheLoss(CapturedStep):
    def compute(self, images, labels, draws):
        sums = super().compute(images, labels, draws)
        return sums if sums[0].item() < 1e9 else sums.zero_()


class WarmUpCounts(CapturedStep):
    def _capture(self, given, draws):
        super()._capture(given, draws)
        self.rate.fill_(self.trial.optimizer.lr)
        self.graph.replay()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("planted", [RateIsBakedIn, ReadsTheLoss, WarmUpCounts])
def test_a_fault_planted_in_a_capture_is_caught(monkeypatch, optimizer, planted):
    stand_ins.recorded_graphs(monkeypatch)
    trial = trial_of("baseline", optimizer, "float32")
    told = "not permitted when stream is capturing" if planted is ReadsTheLoss else "not (close|equal)"
    with pytest.raises((AssertionError, RuntimeError), match=told):
        assert_same(trained(planted, trial), trained(Step, trial), exactly=False)


def test_dropout_is_captured_anew(monkeypatch):
    """What a graph was captured with stays in it, until it starts over."""
    stand_ins.recorded_graphs(monkeypatch)
    trial = trial_of("baseline", "sgd", "float32", options=SMALL["baseline"] | {"dropout": 0.5})
    part, cpu = part_on(torch.device("cpu")), torch.device("cpu")
    network = to_device(build_network(trial, 10, 32), cpu).eval()
    plan = ExecutionPlan("cpu", "float32", "off", "channels_last", 1)
    captured = CapturedStep(network, network, Normalizer(trial.normalization, cpu), trial, plan, cpu)
    batch = Draws.of(part.rows, trial, 0).batch(0, BATCH)
    losses = {float(captured(part, batch, 0.0)[0]) for _ in range(3)}
    network.train()
    assert {float(captured(part, batch, 0.0)[0]) for _ in range(3)} == losses
    assert len(losses) == 1
    captured.start_over()
    assert len({float(captured(part, batch, 0.0)[0]) for _ in range(3)}) == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_graph_for_the_compiler(name):
    """No break in it, neither in training nor in evaluation, and the same code again for the next batch."""
    trial = trial_of(name, "sgd", "float32")
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = build_network(trial, 10, 32)
    compiled = torch.compile(network, backend=counted, dynamic=False, fullgraph=True)
    for training in (True, False):
        network.train(training)
        compiled(torch.randn(BATCH, 3, 32, 32))
        before = len(graphs)
        compiled(torch.randn(BATCH, 3, 32, 32))
        assert len(graphs) == before
    torch._dynamo.reset()
    assert 1 <= len(graphs) <= 2
