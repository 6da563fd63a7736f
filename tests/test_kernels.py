"""Fused activations and poolings against PyTorch's own: values, gradients, ties, and the networks they go into."""

import pytest
import torch
from torch import nn

from harness import kernels, plugins
from harness.config import Trial
from harness.kernels import ActivatedPooling, Activation, fuse

OPTIONS = {"transfer": {"resize": 32}}


@pytest.fixture
def uncompiled():
    """The kernels' formulas alone: compiling them takes seconds, and a slow test does it."""
    with torch.compiler.set_stance("force_eager"):
        yield


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


CASES = [
    (kind, dtype, ties)
    for kind in (nn.ReLU, nn.Mish, None)
    for dtype in (torch.float32, torch.bfloat16)
    for ties in (False, True)
]


def check_pooling(kind, dtype, ties, side=(8, 6), shape=(3, 5)):
    plain = nn.Sequential(kind() if kind else nn.Identity(), nn.MaxPool2d(2))
    same(ActivatedPooling(kind), plain, images(dtype, side, ties, shape), 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(("kind", "dtype", "ties"), CASES)
def test_pooling_is_pytorchs(uncompiled, kind, dtype, ties):
    check_pooling(kind, dtype, ties)


@pytest.mark.parametrize("side", [(7, 6), (6, 7), (9, 9)])
def test_odd_sides_are_cut(uncompiled, side):
    check_pooling(nn.Mish, torch.float32, False, side)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (6, 7)])
def test_mish_is_pytorchs(uncompiled, shape, dtype):
    x = (8 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    same(Activation(nn.Mish), nn.Mish(), x, 1e-5 if dtype == torch.float32 else 3e-2)


def test_mish_far_out(uncompiled):
    x = torch.tensor([-200.0, -50.0, -20.0, -1e-8, 0.0, 1e-8, 19.9, 20.1, 50.0, 1e4])
    same(Activation(nn.Mish), nn.Mish(), x, 1e-6)


def network(name):
    torch.manual_seed(0)
    return plugins.build_network(Trial(architecture=name, options=OPTIONS.get(name, {})), 10, 32)


@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_fused_network_is_the_same_function(uncompiled, name):
    plain, fused = network(name), fuse(network(name))
    assert list(plain.state_dict()) == list(fused.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(plain.eval()(x), fused.eval()(x), atol=1e-5)


def test_what_is_replaced():
    kinds = [type(m).__name__ for m in fuse(network("final"))]
    assert kinds.count("Mish") == kinds.count("MaxPool2d") == 0
    assert kinds.count("ActivatedPooling") == 3
    other = fuse(nn.Sequential(nn.MaxPool2d(3, 2), nn.MaxPool2d(2, ceil_mode=True), nn.SiLU(), nn.ReLU()))
    assert [type(m) for m in other] == [nn.MaxPool2d, nn.MaxPool2d, nn.SiLU, nn.ReLU]


@pytest.mark.slow
def test_compiled_kernels_are_pytorchs():
    """Vector code with and without a rest; another number of images is no new compilation, in training or without."""
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for kind, dtype, ties in CASES:
        for channels in (5, 64):
            check_pooling(kind, dtype, ties, shape=(3, channels))
    compiled = graphs["unique_graphs"]
    assert compiled > before
    for kind, dtype, ties in CASES:
        for channels in (5, 64):
            check_pooling(kind, dtype, ties, shape=(7, channels))
    with torch.no_grad():
        ActivatedPooling(nn.Mish)(images(torch.float32, shape=(2, 64)))
    assert graphs["unique_graphs"] == compiled
    same(Activation(nn.Mish), nn.Mish(), images(torch.float32, shape=(3, 64)), 1e-5)


def test_kernels_are_made_once():
    assert kernels.activation_kernels(nn.Mish) is kernels.activation_kernels(nn.Mish)
