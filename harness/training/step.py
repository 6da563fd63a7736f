"""One optimisation step for a device: batch preparation, autocast, forward, backward, update.

A batch's random draws are arguments, so that a step has no random state except dropout's.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harness.config import Trial
from harness.data.augmentation import Draws, augment
from harness.data.batches import DeviceSplit, Normalizer
from harness.training.compilation import prepare_network
from harness.training.execution import ExecutionPlan, autocast
from harness.training.features import StoredFeatures
from harness.training.network import load_tensors, own_tensors
from harness.training.optimizers import make_optimizer


class ForwardBackward:
    """A step without its optimiser, which takes PyTorch 1.5 s to import: `backward` leaves the gradients of a batch.

    `normalize`: maps an augmented batch of the split to the input of `forward`.
    """

    def __init__(
        self, network: nn.Module, forward: Any, normalize: Any, trial: Trial, plan: ExecutionPlan, device: torch.device
    ):
        self.network, self.forward, self.normalize = network, forward, normalize
        self.trial, self.plan, self.device = trial, plan, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "float16")
        self.loss = nn.CrossEntropyLoss(label_smoothing=trial.label_smoothing)

    def backward(self, images: torch.Tensor, labels: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, logits), detached; the gradients are left in the parameters, multiplied by the scaler's scale."""
        inputs = self.normalize(augment(images, draws, self.trial.augmentation.crop_padding))
        # Autocast stays outside the compiled code: with it inside, PyTorch would not cache the compiled graph.
        with autocast(self.plan.precision, self.device):
            logits = self.forward(inputs)
        loss = self.loss(logits.float(), labels)
        self.scaler.scale(loss).backward()
        return loss.detach(), logits.detach()


class Step(ForwardBackward):
    """`step(part, draws, rate)` trains `network` on one batch of the split and returns sums that stay on the device."""

    def __init__(
        self, network: nn.Module, forward: Any, normalize: Any, trial: Trial, plan: ExecutionPlan, device: torch.device
    ):
        super().__init__(network, forward, normalize, trial, plan, device)
        self.optimizer = make_optimizer(network, trial, device)

    def __call__(self, part: DeviceSplit, draws: Draws, rate: float) -> torch.Tensor:
        """Train on the batch given by `draws`; returns [loss * B, number correct], float32, without synchronising."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return self.compute(*part.batch(draws.rows), draws)

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors of the network and the optimiser by name, not copied."""
        found = {f"network.{name}": tensor for name, tensor in own_tensors(self.network).items()}
        for number, parameter in enumerate(self._parameters()):
            for name, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{number}.{name}"] = value
        return found

    def restore(self, state: Mapping[str, torch.Tensor], scaler: Mapping[str, Any]) -> None:
        """Resume from the results of `state` and `scaler.state_dict`; call it before the first step."""
        prefix = "network."
        load_tensors(self.network, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        parameters = self._parameters()
        for key, value in state.items():
            kind, number, name = key.split(".", 2)
            if kind == "optimizer":
                parameter = parameters[int(number)]
                # Fused optimisers need the state in the parameter's own memory layout.
                like = parameter if value.shape == parameter.shape else value.to(parameter.device)
                self.optimizer.state[parameter][name] = torch.empty_like(like).copy_(value)
        self.scaler.load_state_dict(dict(scaler))

    def start_over(self) -> None:
        """Discard a captured graph, as modules have changed since (for example, dropout was enabled)."""

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def compute(self, images: torch.Tensor, labels: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The step except for gathering the batch and setting the learning rate."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, logits = self.backward(images, labels, draws)
        if self.trial.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.trial.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        correct = (logits.argmax(1) == labels).sum()
        return torch.stack((loss * len(labels), correct.float()))


class CapturedStep(Step):
    """The same step as one CUDA graph: augmentation, forward, backward and update are one launch.

    Images, labels, draws and learning rate are copied into fixed tensors; dropout draws new random numbers at every
    replay.
    """

    WARM_UP = 3  # steps before a capture: libraries allocate and choose algorithms, optimisers create state

    def __init__(
        self, network: nn.Module, forward: Any, normalize: Any, trial: Trial, plan: ExecutionPlan, device: torch.device
    ):
        super().__init__(network, forward, normalize, trial, plan, device)
        self.rate = torch.zeros((), device=device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, part: DeviceSplit, draws: Draws, rate: float) -> torch.Tensor:
        images, labels = part.batch(draws.rows)
        given = (images, labels, *(t for t in (draws.flips, draws.shifts) if t is not None))
        if self.graph is None:
            self._capture(given, draws)
        assert self.graph is not None
        for fixed, new in zip(self.fixed, given, strict=True):
            fixed.copy_(new)
        self.rate.fill_(rate)
        self.graph.replay()
        return self.sums

    def start_over(self) -> None:
        self.graph = None

    def _capture(self, given: Sequence[torch.Tensor], draws: Draws) -> None:
        self.fixed = [tensor.clone() for tensor in given]
        images, labels, *rest = self.fixed
        flips = rest.pop(0) if draws.flips is not None else None
        fixed = Draws(draws.rows, flips, rest.pop(0) if draws.shifts is not None else None)
        tensors = [*self.network.parameters(), *self.network.buffers()]
        before = [t.detach().clone() for t in tensors]
        kept = {(p, name): v.clone() for p, state in self.optimizer.state.items() for name, v in state.items()}
        scaler = self.scaler.state_dict()
        random_state = torch.cuda.get_rng_state(self.device)
        stream, before_stream = _capture_stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(before_stream)
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self.compute(images, labels, fixed)
        before_stream.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.sums = self.compute(images, labels, fixed)
        finally:  # after a failed capture PyTorch 2.11 stays on the capture stream
            torch.cuda.set_stream(before_stream)
        # Undo the warm-up steps; these optimisers treat zero momentum and missing momentum alike.
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            for parameter, state in self.optimizer.state.items():
                for name, value in state.items():
                    value.copy_(kept.get((parameter, name), torch.zeros_like(value)))
        self.scaler.load_state_dict(scaler)
        torch.cuda.set_rng_state(random_state, self.device)
        self.graph = graph


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures of a process, as cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def make_step(
    network: nn.Module, trial: Trial, plan: ExecutionPlan, device: torch.device, on_features: bool = False
) -> Step:
    """The step for that plan and network, which is given as its architecture built it.

    `on_features`: the split holds outputs of `network.features`, and the step trains only `network.head`.
    """
    kind = CapturedStep if plan.captured else Step
    normalize = (
        StoredFeatures(plan.memory_format)
        if on_features
        else Normalizer(trial.normalization, device, plan.memory_format)
    )
    return kind(*prepare_network(network, plan, device, on_features), normalize, trial, plan, device)
