"""The harness's own convolutions against PyTorch's, and which are left to PyTorch."""

import copy
from fractions import Fraction

import pytest
import torch
from networks import images, same
from torch import nn
from torch.nn.utils import prune

from harness.cpu_kernels import build, functions
from harness.cpu_kernels.fuse import PooledConvolution, WinogradConvolution, fuse


@pytest.mark.parametrize(
    ("m", "r", "points"), [(2, 3, "0 1 -1"), (4, 3, "0 1 -1 2 -2"), (4, 5, "0 1 -1 2 -2 1/2 -1/2")]
)
def test_cook_toom_is_exact(m, r, points):
    """Minimal filtering in rational numbers is the correlation itself."""
    a, g, b = build.cook_toom(m, r, [Fraction(p) for p in points.split()])
    x, w = [Fraction(i * i + 1, 3) for i in range(m + r - 1)], [Fraction(5 - i, 7) for i in range(r)]
    products = [dot(one, w) * dot(other, x) for one, other in zip(g, b, strict=True)]
    assert [dot(row, products) for row in a] == [dot(w, x[i : i + r]) for i in range(m)]


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("channels", "filters", "r", "padding", "side"),
    [
        (32, 64, 3, 1, (8, 8)),
        (64, 32, 3, 1, (7, 13)),
        (32, 64, 5, 2, (16, 8)),
        (48, 48, 5, 2, (8, 8)),
        (64, 64, 3, 0, (6, 10)),
    ],
)
def test_convolution_is_pytorchs(monkeypatch, channels, filters, r, padding, side, threads):
    """Outputs and gradients against float64: within 1e-5 of their norm, at any size, some images at a time."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(functions, "CACHE", 1 << 16)
    monkeypatch.setattr(functions, "LEAST_USED", 0.0)
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, filters, r, padding=padding)
    exact = copy.deepcopy(plain).double()
    (fused,) = fuse(nn.Sequential(plain))
    assert isinstance(fused, WinogradConvolution)
    x = images(torch.float32, side, shape=(5, channels))
    found = []
    for network, given in ((exact, x.double()), (fused, x.clone(memory_format=torch.preserve_format))):
        given.requires_grad_()
        y = network(given)
        weights = torch.arange(y.numel()).reshape(y.shape).double().sin().to(y.dtype)
        found.append((y, *torch.autograd.grad((y * weights).sum(), [given, network.weight, network.bias])))
    for right, one in zip(*found, strict=True):
        assert right.shape == one.shape
        assert (one - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("channels", "filters", "r", "padding", "side"),
    [(3, 32, 5, 2, (32, 32)), (3, 64, 3, 1, (7, 10)), (1, 32, 7, 0, (13, 12)), (4, 96, 1, 0, (5, 4))],
)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_with_pooling_is_pytorchs(monkeypatch, channels, filters, r, padding, side, threads, bias):
    """Outputs and gradients against float64, odd sizes and more filters than a panel among them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(channels, filters, r, padding=padding, bias=bias), nn.ReLU(), nn.MaxPool2d(2))
    exact = copy.deepcopy(plain).double()
    fused = fuse(plain)
    assert [type(m) for m in fused] == [PooledConvolution, nn.Identity, nn.Identity]
    x = images(torch.float32, side, shape=(5, channels))
    assert fused[0].gains(x)
    found = []
    for network, given in ((exact, x.double()), (fused, x)):
        y = network(given)
        weights = torch.arange(y.numel()).reshape(y.shape).double().sin().to(y.dtype)
        found.append((y, *torch.autograd.grad((y * weights).sum(), list(network.parameters()))))
    for right, one in zip(*found, strict=True):
        assert right.shape == one.shape
        assert (one - right).norm() < 1e-5 * right.norm()


def test_convolution_with_pooling_is_pytorchs_own_where_the_kernel_does_not_apply():
    plain = nn.Sequential(nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
    fused = fuse(copy.deepcopy(plain))
    small = images(torch.float32, (3, 3), shape=(2, 3))  # one pooled pixel
    assert torch.equal(fused(small), plain(small))
    same(fused, plain, images(torch.float32, (8, 8), shape=(2, 3)), 1e-5)  # the images' gradient is asked for
    x = images(torch.float32, (8, 8), shape=(2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), plain(x))
    for spoiled in (float("nan"), float("inf")):
        x[0, 0, 3, 3] = spoiled
        assert torch.equal(fused(x).isfinite(), plain(x).isfinite())
    with pytest.raises(RuntimeError):
        fused(x[:, :2])


@pytest.mark.parametrize(
    "changes", [{"stride": 2}, {"in_channels": 5}, {"out_channels": 40}, {"padding": "same"}, {"kernel_size": (3, 5)}]
)
def test_convolutions_before_pooling_that_stay(changes):
    convolution = nn.Conv2d(**{"in_channels": 3, "out_channels": 32, "kernel_size": 5, "padding": 2} | changes)
    assert fuse(nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2)))[0] is convolution
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    assert type(fuse(nn.Sequential(nn.Conv2d(3, 32, 5), hooked, nn.MaxPool2d(2)))[0]) is nn.Conv2d


def test_a_convolution_is_pytorchs_own_where_winograd_does_not_apply():
    plain = nn.Conv2d(64, 64, 3, padding=1)
    (fused,) = fuse(nn.Sequential(copy.deepcopy(plain)))
    x = images(torch.float32, (5, 5), shape=(2, 64))  # tiles of 4 would be mostly empty
    assert torch.equal(fused(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        x = images(torch.float32, (8, 8), shape=(2, 64))
        assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize(
    "changes",
    [
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"kernel_size": 7},
        {"padding": "same"},
    ]
    + [{"in_channels": 3}, {"in_channels": 40}, {"out_channels": 16}, {"kernel_size": (3, 5)}, {"padding": (0, 1)}],
)
def test_convolutions_that_stay(changes):
    convolution = nn.Conv2d(**{"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 1} | changes)
    assert fuse(nn.Sequential(convolution))[0] is convolution


@pytest.mark.parametrize("reparametrised", [nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_a_convolution_whose_weight_a_hook_sets_stays(reparametrised):
    network = fuse(nn.Sequential(reparametrised(nn.Conv2d(64, 64, 3, padding=1))))
    assert type(network[0]) is nn.Conv2d
    assert "0.weight_orig" in dict(network.named_parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["weight", "input", ""])
def test_gradients_that_are_not_asked_for(bias, frozen):
    plain = nn.Conv2d(64, 64, 3, padding=1, bias=bias)
    plain.weight.requires_grad_(frozen != "weight")
    (fused,) = fuse(nn.Sequential(copy.deepcopy(plain)))
    found = []
    for network in (plain, fused):
        x = images(torch.float32, (8, 8), shape=(2, 64)).requires_grad_(frozen != "input")
        network(x).square().sum().backward()
        found.append([x.grad, network.weight.grad, network.bias.grad if bias else None])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-3, atol=1e-2)
