"""Replaces modules of a network with the CPU kernels: `fuse(network)`."""

import math

import torch
from torch import nn

from harness.cpu_kernels import build
from harness.cpu_kernels.build import WINOGRAD
from harness.cpu_kernels.functions import (
    LANES,
    LEAST_USED,
    PANEL,
    SPAN,
    SUFFIXES,
    ActivationFunction,
    DirectPoolingFunction,
    PoolingFunction,
    WinogradFunction,
    applies,
    tile_grid,
    to_images,
    to_rows,
)

# Minimum C * K / (C + K) at which Winograd speeds up a convolution of C to K channels: the arithmetic saved grows with
# the product, the memory traffic of the transforms with the sum.
LEAST_CHANNELS = 20.0
FEW_CHANNELS = 4  # most input channels for which direct.cpp is used


class Activation(nn.Module):
    """Mish, on tensors of any shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if applies(x):
            return to_images(ActivationFunction.apply(to_rows(x), "Mish"))
        return ActivationFunction.apply(x.contiguous(), "Mish") if x.dtype in SUFFIXES else nn.functional.mish(x)


class ActivatedPooling(nn.Module):
    """An activation (ReLU, Mish, Same: none), then 2x2 max pooling of images [N, C, H, W] -> [N, C, H // 2, W // 2]."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not applies(x) or min(x.shape[2:]) < 2:
            plain = {"Same": nn.Identity(), "ReLU": nn.ReLU(), "Mish": nn.Mish()}[self.kind]
            return nn.functional.max_pool2d(plain(x), 2)
        return to_images(PoolingFunction.apply(to_rows(x), self.kind))


class WinogradConvolution(nn.Module):
    """The given convolution, sharing its parameters; PyTorch computes it where Winograd would not be faster."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding = int(convolution.padding[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gains(x):
            return to_images(WinogradFunction.apply(to_rows(x), self.weight, self.bias, self.padding))
        return nn.functional.conv2d(x, self.weight, self.bias, padding=self.padding)

    def gains(self, x: torch.Tensor) -> bool:
        """Whether Winograd is used: for float32 images whose outputs fill most of the tiles, without autocast."""
        _, c, r, _ = self.weight.shape
        if torch.is_autocast_enabled("cpu") or not applies(x) or x.shape[1] != c:
            return False
        size = [side + 2 * self.padding - r + 1 for side in x.shape[2:]]
        used = math.prod(size) / max(1, math.prod(tile_grid(r, [0, *size])) * WINOGRAD[r][0] ** 2)
        return min(size) > 0 and used >= LEAST_USED and x.dtype == self.weight.dtype == torch.float32


class PooledConvolution(nn.Module):
    """The given convolution of few channels, sharing its parameters, then ReLU and 2x2 max pooling."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding = int(convolution.padding[0])
        self.pooling = ActivatedPooling("ReLU")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gains(x):
            padded = nn.functional.pad(to_rows(x), (0, 0, *[self.padding] * 4))
            return to_images(DirectPoolingFunction.apply(padded, self.weight, self.bias))
        pooled: torch.Tensor = self.pooling(nn.functional.conv2d(x, self.weight, self.bias, padding=self.padding))
        return pooled

    def gains(self, x: torch.Tensor) -> bool:
        """Whether direct.cpp is used: for large enough float32 images that need no gradient, without autocast."""
        if torch.is_autocast_enabled("cpu") or not applies(x) or x.requires_grad or x.shape[1] != self.weight.shape[1]:
            return False
        pooled = [(side + 2 * self.padding - self.weight.shape[2] + 1) // 2 for side in x.shape[2:]]
        return min(pooled) >= SPAN and x.dtype == self.weight.dtype == torch.float32


def fuse(network: nn.Module) -> nn.Module:
    """The network with its Mish activations, 2x2 max poolings and most convolutions replaced, in place.

    Inside nn.Sequential a pooling is fused with the ReLU or Mish right before it, and with a convolution of few
    channels before that ReLU, so intermediate tensors differ from the original network's. Containers keep their
    length, so that parameter names do not change. Not replaced: modules with hooks, which may set weights, and in-place
    activations whose input other modules may use. Raises RuntimeError where the kernels cannot be compiled.
    """
    build.library()
    for module in list(network.modules()):
        names = list(module._modules)
        in_sequence = type(module).forward is nn.Sequential.forward
        for name, following, last in zip(names, [*names, ""][1:], [*names, "", ""][2:], strict=True):
            child = module._modules[name]
            after = module._modules[following] if following and in_sequence else None
            pooling = module._modules[last] if last and in_sequence else None
            seen_elsewhere = getattr(child, "inplace", False) and (name == names[0] or not in_sequence)
            if _has_hooks(child) or seen_elsewhere:
                continue
            to_pooling = type(after) is nn.ReLU and _is_2x2(pooling) and not _has_hooks(after, pooling)
            if type(child) is nn.Conv2d and to_pooling and _is_few(child):
                module._modules[name] = PooledConvolution(child)
                module._modules[following], module._modules[last] = nn.Identity(), nn.Identity()
            elif type(child) in (nn.ReLU, nn.Mish) and _is_2x2(after) and not _has_hooks(after):
                module._modules[name] = nn.Identity()
                module._modules[following] = ActivatedPooling(type(child).__name__)
            elif type(child) is nn.Mish:
                module._modules[name] = Activation()
            elif _is_2x2(child):
                module._modules[name] = ActivatedPooling("Same")
            elif type(child) is nn.Conv2d and _gains(child):
                module._modules[name] = WinogradConvolution(child)
    return network


def _has_hooks(*modules: nn.Module | None) -> bool:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, kind, None) for module in modules for kind in kinds)


def _gains(convolution: nn.Conv2d) -> bool:
    """Whether Winograd can compute the convolution and saves more than its transforms cost."""
    c, k = convolution.in_channels, convolution.out_channels
    return (
        _is_dense(convolution)
        and convolution.kernel_size[0] in WINOGRAD
        and c % LANES == k % LANES == 0
        and c * k / (c + k) >= LEAST_CHANNELS
    )


def _is_few(convolution: nn.Conv2d) -> bool:
    """Whether direct.cpp can compute the convolution."""
    few = convolution.in_channels <= FEW_CHANNELS and convolution.out_channels % PANEL == 0
    return few and _is_dense(convolution)


def _is_dense(convolution: nn.Conv2d) -> bool:
    """Whether it has square ungrouped filters, stride and dilation 1, and zero padding smaller than the filter."""
    r, other = convolution.kernel_size
    padding = convolution.padding
    return (
        r == other
        and convolution.stride == convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and not isinstance(padding, str)
        and padding[0] == padding[1] < r
    )


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
