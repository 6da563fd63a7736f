"""Autograd functions for the activations, max pooling and convolutions of the C++ sources."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from harness.cpu_kernels.build import WINOGRAD, call

LANES = 16  # channels per vector, as in kernels.cpp
ROWS = 8  # tiles per block of a matrix product, in winograd.cpp
PANEL, SPAN = 32, 2  # filters and pooled pixels per block, as in direct.cpp
LEAST_USED = 0.7  # minimum share of the pixels covered by complete tiles that are outputs
CACHE = 2 << 20  # bytes of transformed tiles per thread and chunk
Gradients = tuple[Tensor | None, ...]  # one per argument of `forward`, None without a gradient

SUFFIXES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


def applies(x: Tensor) -> bool:
    return x.dtype in SUFFIXES and x.dim() == 4


def to_rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> contiguous [N, H, W, C]; a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_images(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2)


class ActivationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        y = torch.empty_like(x)
        call(f"{kind}_{SUFFIXES[x.dtype]}", x, y, x.numel())
        ctx.save_for_backward(x)
        ctx.kind = kind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        call(f"{ctx.kind}_backward_{SUFFIXES[x.dtype]}", x, gradient.contiguous(), dx, x.numel())
        return dx, None


class PoolingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        n, h, w, c = x.shape
        y = x.new_empty(n, h // 2, w // 2, c)
        position = torch.empty_like(y, dtype=torch.uint8)
        call(f"{kind}_pool_{SUFFIXES[x.dtype]}", x, y, position, n, h, w, c)
        ctx.save_for_backward(x if kind == "Mish" else y, position)
        ctx.kind, ctx.shape = kind, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        given, position = ctx.saved_tensors
        dx = (given.new_zeros if ctx.shape[1] % 2 or ctx.shape[2] % 2 else given.new_empty)(ctx.shape)
        call(f"{ctx.kind}_pool_backward_{SUFFIXES[dx.dtype]}", given, gradient.contiguous(), position, dx, *dx.shape)
        return dx, None


class WinogradFunction(torch.autograd.Function):
    """Images [N, H, W, C] with filters [K, C, R, R] and padding p -> [N, H + 2p - R + 1, W + 2p - R + 1, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        k, _, r, _ = weight.shape
        y = x.new_empty(x.shape[0], *(side + 2 * padding - r + 1 for side in x.shape[1:3]), k)
        _winograd("convolve", r, x, y, padding, _filters(weight), bias, y)
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
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


class DirectPoolingFunction(torch.autograd.Function):
    """Padded images [N, H, W, C] with filters [K, C, R, R], ReLU, 2x2 pooling
    -> [N, (H - R + 1) // 2, (W - R + 1) // 2, K]; no gradient for the images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, y, position = ctx.saved_tensors
        k, c, r, _ = ctx.weight
        du = x.new_zeros(torch.get_num_threads(), k // PANEL, r * r * c + 1, PANEL)
        call("direct_pool_backward", x, y, gradient.contiguous(), position, du, *x.shape, k, r)
        du = du.sum(0)
        dw = du[:, :-1].reshape(k // PANEL, r, r, c, PANEL).permute(0, 4, 3, 1, 2).reshape(ctx.weight)
        return None, dw, du[:, -1].reshape(k) if ctx.needs_input_grad[2] else None


def _winograd(kernel: str, r: int, x: Tensor, y: Tensor, padding: int, *given: Tensor | None) -> None:
    """Run a Winograd kernel over images x [N, H, W, C] and outputs y [N, OH, OW, K].

    Tiles are processed in chunks whose transforms fit into the processor's cache, but are at least as large as the
    transformed filters.
    """
    c, k = x.shape[3], y.shape[3]
    tiles = x.shape[0] * math.prod(tile_grid(r, y.shape))
    room = CACHE * torch.get_num_threads() // (4 * _positions(r))
    chunk = min(max(room, c * k) // (c + k), tiles)
    chunk = -(-chunk // ROWS) * ROWS
    v, m = (x.new_empty(_positions(r) * (chunk * channels + LANES)) for channels in (c, k))
    call(f"winograd_{kernel}_{r}", x, *given, v, m, *x.shape, *y.shape[1:], padding, chunk)


def _positions(r: int) -> int:
    """Number of values of a transformed tile: n * n."""
    return (WINOGRAD[r][0] + r - 1) ** 2


def tile_grid(r: int, shape: Sequence[int]) -> list[int]:
    """Number of tiles [down, across] for outputs of `shape` [N, H, W, K]."""
    return [math.ceil(side / WINOGRAD[r][0]) for side in shape[1:3]]


def _filters(weight: Tensor, turned: bool = False) -> Tensor:
    """Filters [K, C, R, R] transformed, in the order in which the kernels read them; `turned`: for backward."""
    k, c, r, _ = weight.shape
    u = weight.new_empty(_positions(r), k, c)
    call(f"winograd_filters_{r}", weight.contiguous(memory_format=torch.channels_last), u, k, c, int(turned))
    return u
