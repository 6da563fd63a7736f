"""What of CUDA can be tried on a machine without a GPU: fake tensors that say they are on one, and CUDA graphs that
record and replay operators."""

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.training import step

CUDA = torch.device("cuda", 0)


def fake_cuda(patch: pytest.MonkeyPatch) -> None:
    """Let PyTorch believe in a GPU with bfloat16; tensors are to be made under FakeTensorMode.

    Autograd cannot go back through such tensors, so that gradients are made up; and fused optimisers have no shapes to
    compute with, so that they are replaced by what their kernels demand: one device and one layout for each parameter
    and its state.
    """
    patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    patch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    for name in ("sgd", "adam", "adamw"):
        patch.setattr(torch, f"_fused_{name}_", _demands_of_fused_kernels)


def _demands_of_fused_kernels(*given: Any, **named: Any) -> None:
    lists = [value for value in (*given, *named.values()) if isinstance(value, list | tuple) and value]
    tensors = [value for value in tree_leaves((given, named)) if isinstance(value, torch.Tensor)]
    assert {tensor.device for tensor in tensors} == {CUDA}
    for of_one_parameter in zip(*lists, strict=True):
        layouts = {(tensor.shape, tensor.stride()) for tensor in of_one_parameter if tensor.dim()}
        assert len(layouts) <= 1, layouts


def to_fake_cuda(network: torch.nn.Module) -> torch.nn.Module:
    """As harness.training.compilation.to_device, which cannot move parameters that are fake."""
    for module in network.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    dense = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
                    moved = tensor.detach().to(CUDA).contiguous(memory_format=dense)
                    is_parameter = kept is module._parameters
                    kept[name] = torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    return network


def make_up_gradients(patch: pytest.MonkeyPatch, network: torch.nn.Module) -> None:
    """In the place of Tensor.backward."""

    def backward(loss: torch.Tensor, *_: Any, **__: Any) -> None:
        assert loss.device == CUDA
        assert loss.dim() == 0
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    patch.setattr(torch.Tensor, "backward", backward)


class Graph:
    """In the place of torch.cuda.CUDAGraph: a replay runs the recorded operators again on the tensors that they had,
    and none of the step's Python."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for operator, given, named, found in self.calls:
            for old, new in zip(tree_leaves(found), tree_leaves(operator(*given, **named)), strict=True):
                is_tensor = isinstance(old, torch.Tensor)
                if is_tensor and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.detach().copy_(new)


class Recording(TorchDispatchMode):
    """In the place of torch.cuda.graph; what waits for the device is refused, as while CUDA captures."""

    def __init__(self, graph: Graph, stream: Any):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operator}")
        found = operator(*args, **(kwargs or {}))
        self.graph.calls.append((operator, args, kwargs or {}, found))
        return found


class Stream:
    def __init__(self, *_: Any): ...

    def wait_stream(self, other: "Stream") -> None: ...


def recorded_graphs(patch: pytest.MonkeyPatch) -> None:
    """Let CapturedStep capture on the CPU."""
    for name, stand_in in {
        "Stream": Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": Stream,
        "set_stream": lambda _: None,
        "CUDAGraph": Graph,
        "graph": Recording,
        "get_rng_state": lambda _: torch.get_rng_state(),
        "set_rng_state": lambda state, _: torch.set_rng_state(state),
    }.items():
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(step, "_capture_stream", Stream)
