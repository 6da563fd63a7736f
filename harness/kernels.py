"""Activations, max pooling and convolutions as kernels of our own, for CPUs: `fuse(network)` puts them into a network.

PyTorch's CPU kernels for Mish and for 2x2 max pooling move far more memory and time than their arithmetic needs;
torch.compile, which could fuse them, turns max pooling into scalar code. Its convolutions are near the processor's
limit: what is left is to multiply less, with Winograd's minimal filtering (Lavin and Gray, arXiv 1509.09308).
kernels.cpp, winograd.cpp and direct.cpp have the loops, which native.py compiles and calls.

Values and gradients are those of PyTorch to rounding; Winograd's rounding error is some ten times that of a direct
convolution in float32, far below bfloat16's. Of equal pixels the first counts as in PyTorch; under bfloat16 the
largest is found before rounding. Of an infinite pixel a whole Winograd tile becomes not-a-number.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from harness import native
from harness.native import WINOGRAD, call

LANES = 16  # channels at a time, as in kernels.cpp
ROWS = 8  # tiles at a time, in winograd.cpp
PANEL, SPAN = 32, 2  # filters and pooled pixels at a time, in direct.cpp

# A convolution of C to K channels gains where C * K / (C + K) is at least so much: what is saved grows with the
# product, what the transforms move with the sum.
LEAST_CHANNELS = 20.0
LEAST_USED = 0.7  # of the pixels that whole tiles cover
FEW_CHANNELS = 4  # of the images that direct.cpp is for
CACHE = 2 << 20  # bytes of transformed tiles at a time and thread

SUFFIXES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


def _applies(x: torch.Tensor) -> bool:
    return x.dtype in SUFFIXES and x.dim() == 4


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> contiguous [N, H, W, C]; a view where it is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _images(rows: torch.Tensor) -> torch.Tensor:
    return rows.permute(0, 3, 1, 2)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        y = torch.empty_like(x)
        call(f"{kind}_{SUFFIXES[x.dtype]}", x, y, x.numel())
        ctx.save_for_backward(x)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        call(f"{ctx.kind}_backward_{SUFFIXES[x.dtype]}", x, gradient.contiguous(), dx, x.numel())
        return dx, None


class _Pooling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind):
        n, h, w, c = x.shape
        y = x.new_empty(n, h // 2, w // 2, c)
        position = torch.empty_like(y, dtype=torch.uint8)
        call(f"{kind}_pool_{SUFFIXES[x.dtype]}", x, y, position, n, h, w, c)
        ctx.save_for_backward(x if kind == "Mish" else y, position)
        ctx.kind, ctx.shape = kind, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        given, position = ctx.saved_tensors
        dx = (given.new_zeros if ctx.shape[1] % 2 or ctx.shape[2] % 2 else given.new_empty)(ctx.shape)
        call(f"{ctx.kind}_pool_backward_{SUFFIXES[dx.dtype]}", given, gradient.contiguous(), position, dx, *dx.shape)
        return dx, None


class _Convolution(torch.autograd.Function):
    """Images [N, H, W, C] with filters [K, C, R, R] and padding p -> [N, H + 2p - R + 1, W + 2p - R + 1, K]."""

    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        k, _, r, _ = weight.shape
        y = x.new_empty(x.shape[0], *(side + 2 * padding - r + 1 for side in x.shape[1:3]), k)
        _winograd("convolve", r, x, y, padding, _filters(weight), bias, y)
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        k, c, r, _ = weight.shape
        gradient = gradient.contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            _winograd("convolve", r, gradient, dx, r - 1 - ctx.padding, _filters(weight, turned=True), None, dx)
        if ctx.needs_input_grad[1]:
            du = x.new_empty(_positions(r), k, c)
            _winograd("correlate", r, x, gradient, ctx.padding, gradient, du)
            dw = torch.empty_like(weight, memory_format=torch.channels_last)
            call(f"winograd_filters_backward_{r}", du, dw, k, c)
        if ctx.needs_input_grad[2]:
            db = gradient.sum((0, 1, 2))
        return dx, dw, db, None


class _DirectPooling(torch.autograd.Function):
    """Images [N, H, W, C], padded, with filters [K, C, R, R], ReLU, 2x2 pooling; no gradient of the images."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        k, _, r, _ = weight.shape
        y = x.new_empty(x.shape[0], *((side - r + 1) // 2 for side in x.shape[1:3]), k)
        position = torch.empty_like(y, dtype=torch.uint8)
        u = weight.reshape(k // PANEL, PANEL, *weight.shape[1:]).permute(0, 3, 4, 2, 1).contiguous()
        call("direct_pool", x, u, bias, y, position, *x.shape, k, r)
        ctx.save_for_backward(x, y, position)
        ctx.weight = weight.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, y, position = ctx.saved_tensors
        k, c, r, _ = ctx.weight
        du = x.new_zeros(torch.get_num_threads(), k // PANEL, r * r * c + 1, PANEL)
        call("direct_pool_backward", x, y, gradient.contiguous(), position, du, *x.shape, k, r)
        du = du.sum(0)
        dw = du[:, :-1].reshape(k // PANEL, r, r, c, PANEL).permute(0, 4, 3, 1, 2).reshape(ctx.weight)
        return None, dw, du[:, -1].reshape(k) if ctx.needs_input_grad[2] else None


def _winograd(kernel: str, r: int, x: torch.Tensor, y: torch.Tensor, padding: int, *given: torch.Tensor | None) -> None:
    """That kernel over images x [N, H, W, C] and outputs y [N, OH, OW, K].

    As many tiles at a time as stay in the processor's cache when they are transformed; at least as much of them as
    there is of the filters.
    """
    c, k = x.shape[3], y.shape[3]
    tiles = x.shape[0] * math.prod(_grid(r, y.shape))
    room = CACHE * torch.get_num_threads() // (4 * _positions(r))
    chunk = min(max(room, c * k) // (c + k), tiles)
    chunk = -(-chunk // ROWS) * ROWS
    v, m = (x.new_empty(_positions(r) * (chunk * channels + LANES)) for channels in (c, k))
    call(f"winograd_{kernel}_{r}", x, *given, v, m, *x.shape, *y.shape[1:], padding, chunk)


def _positions(r: int) -> int:
    """Of a transformed tile: n * n."""
    return (WINOGRAD[r][0] + r - 1) ** 2


def _grid(r: int, shape: Sequence[int]) -> list[int]:
    """Tiles down and across, for outputs [N, H, W, K] of that shape."""
    return [math.ceil(side / WINOGRAD[r][0]) for side in shape[1:3]]


def _filters(weight: torch.Tensor, turned: bool = False) -> torch.Tensor:
    """[K, C, R, R] transformed, in the order in which the kernels read them; `turned` as backward needs them."""
    k, c, r, _ = weight.shape
    u = weight.new_empty(_positions(r), k, c)
    call(f"winograd_filters_{r}", weight.contiguous(memory_format=torch.channels_last), u, k, c, int(turned))
    return u


class Activation(nn.Module):
    """Mish, on tensors of any shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _applies(x):
            return _images(_Activation.apply(_rows(x), "Mish"))
        return _Activation.apply(x.contiguous(), "Mish") if x.dtype in SUFFIXES else nn.functional.mish(x)


class ActivatedPooling(nn.Module):
    """An activation (ReLU, Mish, Same: none), then 2x2 max pooling of images [N, C, H, W]; odd sides are cut."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _applies(x) or min(x.shape[2:]) < 2:
            plain = {"Same": nn.Identity(), "ReLU": nn.ReLU(), "Mish": nn.Mish()}[self.kind]
            return nn.functional.max_pool2d(plain(x), 2)
        return _images(_Pooling.apply(_rows(x), self.kind))


class WinogradConvolution(nn.Module):
    """The given convolution, with its parameters; where Winograd does not gain, PyTorch computes it."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding = int(convolution.padding[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gains(x):
            return _images(_Convolution.apply(_rows(x), self.weight, self.bias, self.padding))
        return nn.functional.conv2d(x, self.weight, self.bias, padding=self.padding)

    def gains(self, x: torch.Tensor) -> bool:
        """For float32 images whose size fills most of the tiles."""
        _, c, r, _ = self.weight.shape
        if torch.is_autocast_enabled("cpu") or not _applies(x) or x.shape[1] != c:
            return False
        size = [side + 2 * self.padding - r + 1 for side in x.shape[2:]]
        used = math.prod(size) / max(1, math.prod(_grid(r, [0, *size])) * WINOGRAD[r][0] ** 2)
        return min(size) > 0 and used >= LEAST_USED and x.dtype == self.weight.dtype == torch.float32


class PooledConvolution(nn.Module):
    """The given convolution of few channels, with its parameters, then ReLU and 2x2 max pooling."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding = int(convolution.padding[0])
        self.pooling = ActivatedPooling("ReLU")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gains(x):
            padded = nn.functional.pad(_rows(x), (0, 0, *[self.padding] * 4))
            return _images(_DirectPooling.apply(padded, self.weight, self.bias))
        return self.pooling(nn.functional.conv2d(x, self.weight, self.bias, padding=self.padding))

    def gains(self, x: torch.Tensor) -> bool:
        """For float32 images that need no gradient, large enough."""
        if torch.is_autocast_enabled("cpu") or not _applies(x) or x.requires_grad or x.shape[1] != self.weight.shape[1]:
            return False
        pooled = [(side + 2 * self.padding - self.weight.shape[2] + 1) // 2 for side in x.shape[2:]]
        return min(pooled) >= SPAN and x.dtype == self.weight.dtype == torch.float32


def fuse(network: nn.Module) -> nn.Module:
    """The network with its Mish activations, 2x2 max poolings and most convolutions replaced, in place.

    Inside nn.Sequential a ReLU or Mish right before a pooling goes into one kernel with it, and so does the convolution
    of the images before a ReLU: whoever looks at the tensors between them sees others. Containers keep their length, so
    that the names of all parameters stay. Modules with hooks, which may set weights, stay as they are, and so do
    activations in place whose input others may see.
    """
    native.library()
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
    """Whether Winograd can compute it, and moves less than it saves."""
    c, k = convolution.in_channels, convolution.out_channels
    return (
        _is_dense(convolution)
        and convolution.kernel_size[0] in WINOGRAD
        and c % LANES == k % LANES == 0
        and c * k / (c + k) >= LEAST_CHANNELS
    )


def _is_few(convolution: nn.Conv2d) -> bool:
    """Whether direct.cpp computes it."""
    few = convolution.in_channels <= FEW_CHANNELS and convolution.out_channels % PANEL == 0
    return few and _is_dense(convolution)


def _is_dense(convolution: nn.Conv2d) -> bool:
    """Whether it has square filters over all channels, moved pixel by pixel, and few zeros around."""
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
