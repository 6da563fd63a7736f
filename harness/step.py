"""One optimisation step for a device: batch preparation, autocast, forward, backward, update.

A batch's random draws come in from outside, so that a step has no random state of its own but dropout's.
"""

import functools
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import execution, kernels
from harness.batches import Draws, Normalizer, Part, Restored, augment, autocast
from harness.config import Schedule, Trial
from harness.execution import Plan


def learning_rate_factor(schedule: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Of the peak rate, for the 0-based `step` of `total_steps`.

    one_cycle is that of torch.optim.lr_scheduler.OneCycleLR at its defaults (30 % cosine rise from 1/25, cosine fall
    to 1/250,000), as in Smith and Topin, arXiv 1708.07120.
    """
    if schedule.name == "one_cycle":
        peak = 0.3 * total_steps - 1
        if step <= peak:
            return _cosine(1 / 25, 1.0, step / max(peak, 1))
        return _cosine(1.0, 1 / 250_000, (step - peak) / max(total_steps - 1 - peak, 1))
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total_steps - warmup, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": _cosine(1.0, 0.0, done)}[schedule.name]


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def make_optimizer(network: nn.Module, trial: Trial, device: torch.device) -> torch.optim.Optimizer:
    """torch.optim's optimiser over what is to be trained, in its fused form (one kernel instead of many)."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    chosen = trial.optimizer
    if chosen.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=chosen.lr,
            momentum=chosen.momentum,
            nesterov=chosen.nesterov,
            weight_decay=chosen.weight_decay,
            fused=True,
        )
        if chosen.momentum:  # zero is the same as none, but for a first step that float16's scaler leaves out
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[chosen.name]
    on_device = device.type == "cuda"  # its step count, which a CUDA graph needs
    return kind(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=True, capturable=on_device)


def to_device(network: nn.Module, device: torch.device, memory_format: str = "channels_last") -> nn.Module:
    """The network on the device in that memory format; from then on float32 on CUDA means float32, not TF32."""
    # Not by the newer `fp32_precision`: once a part of it is set, PyTorch raises where it reads these itself, as its
    # export does (pytorch issue 179445).
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # PyTorch 2.11 advises what was just decided
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    return network.to(device).to(memory_format=formats[memory_format])


class Dropout(nn.Module):
    """nn.Dropout whose rate is a tensor: torch.compile would compile anew for each other number."""

    rate: torch.Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.register_buffer("rate", torch.tensor(rate), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        kept = torch.rand(x.shape, device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


COMPILED_NETWORKS = 4  # that a process keeps
_compiled: dict[Any, tuple[nn.Module, Any]] = {}


def prepare(network: nn.Module, plan: Plan, device: torch.device, on_features: bool = False) -> tuple[nn.Module, Any]:
    """The network as the plan executes it, and what computes its forward pass in training, or of it the head's.

    A network that torch.compile has compiled stays in this process: a later one that differs in weights and dropout
    rates alone is poured into it, and nothing is compiled again. torch.compile falls back to eager after so many
    recompilations with a mere warning; here that is an error.
    """
    if not plan.traces:
        network = to_device(kernels.fuse(network) if plan.compile == "kernels" else network, device, plan.memory_format)
        return network, network.head if on_features else network
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64  # counted per function, which networks and layers share
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                module._modules[name] = Dropout(child.p)
    key = (plan, str(device), on_features, _structure(network))
    if key in _compiled:
        kept, forward = _compiled[key]
        own = [*kept.parameters(), *kept.buffers()]
        with torch.no_grad():
            for old, new in zip(own, [*network.parameters(), *network.buffers()], strict=True):
                old.copy_(new)
                old.grad = None
        return kept, forward
    if len(_compiled) == COMPILED_NETWORKS:
        _compiled.clear()
        torch._dynamo.reset()
    network = to_device(network, device, plan.memory_format)
    # Every shape is compiled for itself: otherwise the code would depend on which shapes came before.
    computed: Any = network.head if on_features else network
    _compiled[key] = network, torch.compile(computed, mode=plan.mode, dynamic=False)
    return _compiled[key]


def forget_compiled() -> None:
    """Empty this process's and this node's caches of compiled code."""
    _compiled.clear()
    torch._dynamo.reset()
    for folder in {os.environ.get("TORCHINDUCTOR_CACHE_DIR"), str(execution.compiled_folder())} - {None}:
        shutil.rmtree(str(folder), ignore_errors=True)
        Path(str(folder)).mkdir(parents=True, exist_ok=True, mode=0o700)


def _structure(network: nn.Module) -> tuple[Any, ...]:
    """All that a network's computation may depend on but the values of its tensors; what cannot be compared is its own
    identity, so that such a network is like no other."""
    plain = (int, float, str, bool, type(None))

    def comparable(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(comparable(v) for v in value)
        if isinstance(value, dict | set) and not value:
            return ()
        return value if isinstance(value, plain) else f"{type(value)} {id(value)}"

    compared_below = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    modules = [
        (name, type(m), tuple(sorted((k, comparable(v)) for k, v in vars(m).items() if k not in compared_below)))
        for name, m in network.named_modules()
    ]
    tensors = [
        (name, tuple(t.shape), t.dtype, t.requires_grad)
        for name, t in [*network.named_parameters(), *network.named_buffers()]
    ]
    return tuple(modules), tuple(tensors)


class Step:
    """`step(part, draws, rate)` trains `network` on one batch of the part and returns sums that stay on the device.

    `normalize`: from what the part holds to what `forward` takes.
    """

    def __init__(
        self, network: nn.Module, forward: Any, normalize: Any, trial: Trial, plan: Plan, device: torch.device
    ):
        self.network, self.forward, self.normalize = network, forward, normalize
        self.trial, self.plan, self.device = trial, plan, device
        self.optimizer = make_optimizer(network, trial, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "float16")
        self.loss = nn.CrossEntropyLoss(label_smoothing=trial.label_smoothing)

    def __call__(self, part: Part, draws: Draws, rate: float) -> torch.Tensor:
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
        self, network: nn.Module, forward: Any, normalize: Any, trial: Trial, plan: Plan, device: torch.device
    ):
        super().__init__(network, forward, normalize, trial, plan, device)
        self.rate = torch.zeros((), device=device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, part: Part, draws: Draws, rate: float) -> torch.Tensor:
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
    return torch.cuda.Stream(device)


def make_step(network: nn.Module, trial: Trial, plan: Plan, device: torch.device, on_features: bool = False) -> Step:
    """The step that the plan means, for a network as its architecture built it.

    `on_features`: its part holds what `network.features` answers, and the step trains `network.head` alone.
    """
    kind = CapturedStep if plan.captured else Step
    normalize = (
        Restored(plan.memory_format) if on_features else Normalizer(trial.normalization, device, plan.memory_format)
    )
    return kind(*prepare(network, plan, device, on_features), normalize, trial, plan, device)
