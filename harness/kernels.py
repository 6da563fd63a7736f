"""Activation and pooling as one compiled kernel each way, for CPUs: `fuse(network)` puts them into a network.

PyTorch's CPU kernels for Mish and for 2x2 max pooling move far more memory and time than their arithmetic needs, and
torch.compile of a whole network, which could fuse them, turns max pooling into scalar code. Here the forward and the
backward pass are each a small function that torch.compile vectorises: channels last, no partitioner between them, and
what backward needs (the input, which of the four was largest) is decided here. Values and gradients are those of
PyTorch to rounding, of equal pixels the first counts as there; under bfloat16 the largest is found before rounding.
Parameters and their names stay as they are. Images may differ in number, not in size, without a new compilation.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

Function = Callable[[torch.Tensor], torch.Tensor]
CUT = 20.0  # from there on mish(x) == x in float32


def mish(x: torch.Tensor) -> torch.Tensor:
    """X * tanh(softplus(x)) with one exponential: tanh(log(1 + e)) = n / (n + 2), where n = e * (e + 2)."""
    e = torch.exp(x.clamp(max=CUT))
    n = e * (e + 2)
    return x * (n / (n + 2))


def mish_derivative(x: torch.Tensor) -> torch.Tensor:
    e = torch.exp(x.clamp(max=CUT))
    n = e * (e + 2)
    d = n + 2
    return (n * d + 4 * x * e * (e + 1)) / (d * d)


def relu(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0)


def relu_derivative(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1.0, 0.0)


def same(x: torch.Tensor) -> torch.Tensor:
    return x


# Kind of module (None: no activation) -> (function, derivative)
ACTIVATIONS: dict[Any, tuple[Function, Function]] = {
    nn.ReLU: (relu, relu_derivative),
    nn.Mish: (mish, mish_derivative),
    None: (same, torch.ones_like),
}


@cache
def activation_kernels(kind):
    """(forward, backward) over flat tensors [M]; one pair a process, for all layers."""
    function, derivative = ACTIVATIONS[kind]

    def forward(x):
        return function(x.float()).to(x.dtype)

    def backward(x, gradient):
        return (gradient.float() * derivative(x.float())).to(x.dtype)

    return _compiled(forward), _compiled(backward)


@cache
def pooling_kernels(kind):
    """(forward, backward) over rows [M, 2, W, 2, C]: M pairs of image rows of W pairs of pixels."""
    function, derivative = ACTIVATIONS[kind]

    def forward(x):
        a, b, c, d = (function(x[:, i, :, j].float()) for i in (0, 1) for j in (0, 1))
        largest = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
        # As a float like the data: vector code for bytes beside floats is slow. The first of equals counts.
        position = torch.where(a == largest, 0.0, torch.where(b == largest, 1.0, torch.where(c == largest, 2.0, 3.0)))
        return largest.to(x.dtype), position.to(x.dtype)

    def backward(x, gradient, position):
        pixel = torch.arange(2, dtype=torch.float32)
        here = (2 * pixel[:, None, None, None] + pixel[:, None]).to(x.dtype)  # [2, 1, 2, 1]
        full = gradient[:, None, :, None].float() * derivative(x.float())
        return torch.where(position[:, None, :, None] == here, full, 0.0).to(x.dtype)

    return _compiled(forward), _compiled(backward)


def _compiled(function):
    """Dimensions are fixed but for those marked dynamic: what is compiled depends on no shape that came before."""
    return torch.compile(function, dynamic=False)


def _call(kernel, *tensors: torch.Tensor):
    """With any number of images, and the same code whether autograd looks on or not."""
    given = [tensor.detach().contiguous() for tensor in tensors]
    for tensor in given:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return kernel(*given)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernels):
        ctx.save_for_backward(x)
        ctx.kernel = kernels[1]
        return _call(kernels[0], x)

    @staticmethod
    def backward(ctx, gradient):
        return _call(ctx.kernel, *ctx.saved_tensors, gradient), None


class _Pooling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernels):
        largest, position = _call(kernels[0], x)
        ctx.save_for_backward(x, position)
        ctx.kernel = kernels[1]
        return largest

    @staticmethod
    def backward(ctx, gradient):
        x, position = ctx.saved_tensors
        return _call(ctx.kernel, x, gradient, position), None


class Activation(nn.Module):
    """An activation of that module's kind, on tensors of any shape."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).contiguous()
        y = _Activation.apply(rows.view(-1), activation_kernels(self.kind)).view(rows.shape)
        return y.permute(0, 3, 1, 2) if x.dim() == 4 else y


class ActivatedPooling(nn.Module):
    """Activation (None: none), then 2x2 max pooling of images [N, C, H, W], H and W even or cut to even."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        if h % 2 or w % 2:
            x = x[:, :, : h - h % 2, : w - w % 2]
        h, w = h // 2, w // 2
        rows = x.permute(0, 2, 3, 1).contiguous().view(n * h, 2, w, 2, c)
        y = _Pooling.apply(rows, pooling_kernels(self.kind))
        return y.view(n, h, w, c).permute(0, 3, 1, 2)


def fuse(network: nn.Module) -> nn.Module:
    """The network with its Mish activations and 2x2 max poolings replaced, in place.

    Inside nn.Sequential a ReLU or Mish right before a pooling goes into its kernel. Containers keep their length, so
    that the names of all parameters stay.
    """
    for module in list(network.modules()):
        names = list(module._modules)
        for name, following in zip(names, [*names, None][1:], strict=True):
            child = module._modules[name]
            in_sequence = type(module).forward is nn.Sequential.forward
            after = module._modules[following] if following and in_sequence else None
            if type(child) in (nn.ReLU, nn.Mish) and following is not None and _is_2x2(after):
                module._modules[name] = nn.Identity()
                module._modules[following] = ActivatedPooling(type(child))
            elif type(child) is nn.Mish:
                module._modules[name] = Activation(nn.Mish)
            elif _is_2x2(child):
                module._modules[name] = ActivatedPooling(None)
    return network


def _is_2x2(module: nn.Module | None) -> bool:
    return (
        type(module) is nn.MaxPool2d
        and module.kernel_size in (2, (2, 2))
        and module.stride in (2, (2, 2))
        and module.padding in (0, (0, 0))
        and module.dilation in (1, (1, 1))
        and not module.return_indices
        and not module.ceil_mode
    )
