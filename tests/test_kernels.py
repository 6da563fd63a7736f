"""The harness's own kernels against PyTorch's: values, gradients, ties, and the networks they go into."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from harness.config import Trial, plugins
from harness.cpu_kernels import build, functions
from harness.cpu_kernels.fuse import ActivatedPooling, Activation, PooledConvolution, WinogradConvolution, fuse
from harness.training.network import build_network

OPTIONS = {"transfer": {"resize": 32}}


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
    same(
        ActivatedPooling(kind.__name__ if kind else "Same"),
        plain,
        images(dtype, side, ties, shape),
        1e-5 if dtype == torch.float32 else 2e-2,
    )


@pytest.mark.parametrize(("kind", "dtype", "ties"), CASES)
def test_pooling_is_pytorchs(kind, dtype, ties):
    check_pooling(kind, dtype, ties)


@pytest.mark.parametrize("channels", [5, 16, 37])
@pytest.mark.parametrize("side", [(7, 6), (6, 7), (9, 9)])
def test_odd_sides_are_cut(side, channels):
    check_pooling(nn.Mish, torch.float32, False, side, (3, channels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (6, 7)])
def test_mish_is_pytorchs(shape, dtype):
    x = (8 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    same(Activation(), nn.Mish(), x, 1e-5 if dtype == torch.float32 else 3e-2)


def test_mish_far_out():
    x = torch.tensor([-200.0, -50.0, -20.0, -1e-8, 0.0, 1e-8, 19.9, 20.1, 50.0, 1e4, 1e18, 1e30])
    same(Activation(), nn.Mish(), x, 1e-6)


def test_mish_of_much():
    """More than one thread takes at a time, and not a multiple of anything."""
    same(Activation(), nn.Mish(), torch.randn(3, 4999, generator=torch.Generator().manual_seed(0)), 1e-5)


def network(name):
    torch.manual_seed(0)
    return build_network(Trial(architecture=name, options=OPTIONS.get(name, {})), 10, 32)


@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_fused_network_is_the_same_function(name):
    plain, fused = network(name), fuse(network(name))
    assert list(plain.state_dict()) == list(fused.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(plain.eval()(x), fused.eval()(x), atol=1e-5)


def test_what_is_replaced():
    kinds = [type(m).__name__ for m in fuse(network("final"))]
    assert kinds.count("Mish") == kinds.count("MaxPool2d") == 0
    assert kinds.count("ActivatedPooling") == 3
    assert kinds.count("WinogradConvolution") == 5
    other = fuse(nn.Sequential(nn.MaxPool2d(3, 2), nn.MaxPool2d(2, ceil_mode=True), nn.SiLU(), nn.ReLU()))
    assert [type(m) for m in other] == [nn.MaxPool2d, nn.MaxPool2d, nn.SiLU, nn.ReLU]


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


def test_what_works_in_place_on_what_others_see_stays():
    first = fuse(nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)))
    assert [type(m) for m in first] == [nn.ReLU, ActivatedPooling]
    later = fuse(nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)))
    assert [type(m) for m in later] == [WinogradConvolution, nn.Identity, ActivatedPooling]


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


@pytest.mark.parametrize(
    ("module", "shape", "dtype"),
    [
        (nn.Mish(), (2, 3), torch.float64),
        (nn.MaxPool2d(2), (2, 3, 4, 4), torch.float64),
        (nn.MaxPool2d(2), (3, 4, 4), torch.float32),
        (nn.Conv2d(64, 64, 3, padding=1).double(), (2, 64, 8, 8), torch.float64),
        (nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8), torch.float32),
    ],
)
def test_other_tensors_are_left_to_pytorch(module, shape, dtype):
    (fused,) = fuse(nn.Sequential(copy.deepcopy(module)))
    x = torch.randn(shape, dtype=dtype)
    assert torch.equal(fused(x), module(x))


@pytest.mark.parametrize(
    ("weights", "shape"),
    [(torch.float32, (2, 32, 8, 8)), (torch.float64, (2, 64, 8, 8)), (torch.float32, (2, 64, 1, 1))],
)
def test_what_pytorch_refuses_is_refused(weights, shape):
    """Channels that do not fit, weights of another type, images smaller than the filters."""
    (fused,) = fuse(nn.Sequential(nn.Conv2d(64, 64, 3).to(weights)))
    with pytest.raises(RuntimeError):
        fused(torch.randn(shape))


def test_a_broken_library_is_compiled_again(monkeypatch, tmp_path):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    build.library_file().write_bytes(b"")
    build.library.cache_clear()
    same(Activation(), nn.Mish(), torch.randn(10), 1e-5)
    assert build.library_file().stat().st_size


def test_a_compiler_that_fails_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "cc").write_text("#!/bin/sh\necho no such flag >&2; exit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "cc"))
    build.library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="cc failed: no such flag"):
            build.library()
    finally:
        build.library.cache_clear()
    assert not build.library_file().exists()
