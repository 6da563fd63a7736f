"""One optimisation step for a device: batch preparation, autocast, forward, backward, update.

A batch's random draws are arguments, so that a step has no random state of its own except dropout's.
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
from harness.training.optimizers import make_optimizer


class Step:
    """`step(part, draws, rate)` trains `network` on one batch of the part and returns sums that stay on the device.

    `normalize`: from what the part holds to what `forward` takes.
    """

    def __init__(
        self, network: nn.Module, forward: Any, normalize: Any, trial: Trial, plan: ExecutionPlan, device: torch.device
    ):
        self.network, self.forward, self.normalize = network, forward, normalize
        self.trial, self.plan, self.device = trial, plan, device
        self.optimizer = make_optimizer(network, trial, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "float16")
        self.loss = nn.CrossEntropyLoss(label_smoothing=trial.label_smoothing)

    def __call__(self, part: DeviceSplit, draws: Draws, rate: float) -> torch.Tensor:
        """The batch that `draws` names -> [loss * B, correct] float32, not yet synchronised."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return self.compute(*part.batch(draws.rows), draws)

    def state(self) -> dict[str, torch.Tensor]:
        """Network and optimiser, by name; not copied."""
        found = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, parameter in enumerate(self._parameters()):
            for name, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{number}.{name}"] = value
        return found

    def restore(self, state: Mapping[str, torch.Tensor], scaler: Mapping[str, Any]) -> None:
        """Go on from what `state` and `scaler.state_dict` returned; before the first step."""
        prefix = "network."
        self.network.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        parameters = self._parameters()
        for key, value in state.items():
            kind, number, name = key.split(".", 2)
            if kind == "optimizer":
                parameter = parameters[int(number)]
                # In the parameter's own memory layout, which fused optimisers rely on.
                like = parameter if value.shape == parameter.shape else value.to(parameter.device)
                self.optimizer.state[parameter][name] = torch.empty_like(like).copy_(value)
        self.scaler.load_state_dict(dict(scaler))

    def start_over(self) -> None:
        """Forget what was captured of earlier steps: modules changed since, dropout was switched on say."""

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def compute(self, images: torch.Tensor, labels: torch.Tensor, draws: Draws) -> torch.Tensor:
        """All of the step but gathering its batch and its learning rate."""
        inputs = self.normalize(augment(images, draws, self.trial.augmentation.crop_padding))
        # Autocast stays outside what is compiled: inside, PyTorch would not cache the compiled graph.
        with autocast(self.plan.precision, self.device):
            logits = self.forward(inputs)
        loss = self.loss(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.trial.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.trial.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        correct = (logits.detach().argmax(1) == labels).sum()
        return torch.stack((loss.detach() * len(labels), correct.float()))


class CapturedStep(Step):
    """The same step as one CUDA graph: augmentation, forward, backward and update are one launch.

    Images, labels, draws and learning rate are copied into fixed tensors; random numbers of dropout go on from replay
    to replay.
    """

    WARM_UP = 3  # steps before a capture: libraries allocate and choose algorithms, optimisers make their state

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
        finally:  # PyTorch 2.11 stays on its own stream where a capture fails
            torch.cuda.set_stream(before_stream)
        # As if nothing had run: a zero momentum and a missing one are the same to these optimisers.
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
    """One for all captures of a process: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def make_step(
    network: nn.Module, trial: Trial, plan: ExecutionPlan, device: torch.device, on_features: bool = False
) -> Step:
    """The step that the plan means, for a network as its architecture built it.

    `on_features`: its part holds what `network.features` answers, and the step trains `network.head` alone.
    """
    kind = CapturedStep if plan.captured else Step
    normalize = (
        StoredFeatures(plan.memory_format)
        if on_features
        else Normalizer(trial.normalization, device, plan.memory_format)
    )
    return kind(*prepare_network(network, plan, device, on_features), normalize, trial, plan, device)
