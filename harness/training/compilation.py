"""Moves networks to their device and compiles them where the execution plan says so."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.cpu_kernels.fuse import fuse
from harness.run.cache import compiled_folder
from harness.training.execution import ExecutionPlan


def to_device(network: nn.Module, device: torch.device, memory_format: str = "channels_last") -> nn.Module:
    """The network on the device in that memory format; also disables TF32 for float32 on CUDA, process-wide."""
    # The newer `fp32_precision` is avoided: once it is set, PyTorch raises where its own code (torch.export) reads
    # these two flags (pytorch issue 179445).
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # PyTorch 2.11 advises to enable TF32
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    return network.to(device).to(memory_format=formats[memory_format])


def usable_format(network: nn.Module, input_size: int) -> str:
    """channels_last, or contiguous where the network fails on such images, as a `view` of a batch does. The network is
    left in that format."""
    device = next(network.parameters()).device
    images = torch.zeros(2, 3, input_size, input_size, device=device).to(memory_format=torch.channels_last)
    was_training = network.training
    try:
        with torch.no_grad():
            network.to(memory_format=torch.channels_last).eval()(images)
    except Exception:
        network.to(memory_format=torch.contiguous_format)
        return "contiguous"
    finally:
        network.train(was_training)
    return "channels_last"


class Dropout(nn.Module):
    """nn.Dropout whose rate is a tensor, as torch.compile would recompile for every other Python number."""

    rate: torch.Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.register_buffer("rate", torch.tensor(rate), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        kept = torch.rand(x.shape, device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


COMPILED_NETWORKS = 4  # most compiled networks that a process caches
_compiled: dict[Any, tuple[nn.Module, Any]] = {}


def prepare_network(
    network: nn.Module, plan: ExecutionPlan, device: torch.device, on_features: bool = False
) -> tuple[nn.Module, Any]:
    """(network as the plan executes it, callable for its training forward pass or, `on_features`, for its head's)

    Networks compiled by torch.compile are cached in this process: a later network that differs only in weights and
    dropout rates is copied into the cached one, without recompiling. Reaching torch.compile's recompilation limit,
    after which it falls back to eager with a mere warning, is an error here.
    """
    if not plan.traces:
        network = to_device(fuse(network) if plan.compile == "kernels" else network, device, plan.memory_format)
        return network, network.head if on_features else network
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64  # counted per Python function, which networks and layers share
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
    # Each shape is compiled separately: with dynamic shapes the code would depend on the shapes seen before.
    computed: Any = network.head if on_features else network
    _compiled[key] = network, torch.compile(computed, mode=plan.mode, dynamic=False)
    return _compiled[key]


def forget_compiled() -> None:
    """Empty this process's and this node's caches of compiled code."""
    _compiled.clear()
    torch._dynamo.reset()
    for folder in {os.environ.get("TORCHINDUCTOR_CACHE_DIR"), str(compiled_folder())} - {None}:
        shutil.rmtree(str(folder), ignore_errors=True)
        Path(str(folder)).mkdir(parents=True, exist_ok=True, mode=0o700)


def _structure(network: nn.Module) -> tuple[Any, ...]:
    """Everything that a network's computation may depend on except the values of its tensors. Attributes that cannot be
    compared are represented by their id, so that such a network equals no other."""
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
