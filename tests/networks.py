"""Every architecture with random weights, its ONNX graph, and the comparison of two functions of images."""

import functools

import onnx
import torch

from export.onnx import to_onnx
from harness.config import Trial
from harness.training.network import build_network

SIDE = 32


def network(name: str) -> torch.nn.Module:
    """Random weights, and batch norm statistics that are not the trivial ones."""
    torch.manual_seed(0)
    options = {"resize": 48} if name == "transfer" else {}
    built = build_network(Trial(architecture=name, options=options), 10, SIDE)
    for module in built.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return built.eval()


@functools.cache
def plain(name: str) -> onnx.ModelProto:
    """Exporting takes seconds: once for all tests."""
    return to_onnx(network(name), torch.randn(2, 3, SIDE, SIDE), 20)


def images(dtype, side=(8, 6), ties=False, shape=(3, 5)):
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(*shape, *side, generator=generator)
    x = x.round() if ties else x
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def same(one, other, x, tolerance):
    """Value and gradient of two functions at x."""
    found = []
    for function in (one, other):
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(given)
        weights = torch.arange(y.numel(), dtype=torch.float32).reshape(y.shape).sin().to(y.dtype)
        found.append((y, *torch.autograd.grad((y * weights).sum(), given)))
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), atol=tolerance, rtol=tolerance)
