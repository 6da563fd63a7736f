"""The harness's own kernels against PyTorch's: values, gradients, ties, and the networks they go into."""

import copy

import pytest
import torch
from networks import images, same
from torch import nn

from harness.config import Trial, plugins
from harness.cpu_kernels import build
from harness.cpu_kernels.fuse import ActivatedPooling, Activation, WinogradConvolution, fuse
from harness.training.network import build_network

OPTIONS = {"transfer": {"resize": 32}}


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


def test_what_works_in_place_on_what_others_see_stays():
    first = fuse(nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)))
    assert [type(m) for m in first] == [nn.ReLU, ActivatedPooling]
    later = fuse(nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)))
    assert [type(m) for m in later] == [WinogradConvolution, nn.Identity, ActivatedPooling]


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
