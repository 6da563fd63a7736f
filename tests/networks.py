"""Every architecture with random weights, and its ONNX graph."""

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
