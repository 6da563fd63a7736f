"""A trained network compiled ahead of time by AOTInductor: one .pt2 file for this kind of CPU."""

import contextlib
import io
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from export.quantize import NotPossible
from harness.config import Normalization
from harness.data.batches import Normalizer
from harness.run.system import compiler

MOST = 4096  # images per call


class _Normalized(nn.Module):
    """The network preceded by its normalisation; takes uint8 images [N, H, W, 3]."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, network: nn.Module, normalization: Normalization):
        super().__init__()
        normalizer = Normalizer(normalization, torch.device("cpu"), "contiguous")
        self.register_buffer("scale", normalizer.scale)
        self.register_buffer("shift", normalizer.shift)
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network((images.float() * self.scale + self.shift).permute(0, 3, 1, 2).contiguous())
        return logits


def checked(network: nn.Module) -> nn.Module:
    """Return the network. Raises NotPossible where this machine has no C++ compiler."""
    if not compiler("cpu"):
        raise NotPossible("AOTInductor needs a C++ compiler; install g++")
    return network


def save_aoti(network: nn.Module, path: Path, example: torch.Tensor, normalization: Normalization | None) -> None:
    """Compile `network` (eval mode, float32, on the CPU) for batches of 1 to 4,096 and write it to `path`.

    `example`: normalised images [N, 3, H, W], N >= 2; with a `normalization` the file takes uint8 [N, H, W, 3].
    """
    module: nn.Module = network
    if normalization is not None:
        module = _Normalized(network, normalization).eval()
        example = torch.zeros(len(example), *example.shape[2:], 3, dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.no_grad(),  # freezing needs it
    ):
        warnings.simplefilter("ignore")  # warnings about the compiler's internals
        batch = torch.export.Dim("batch", min=1, max=MOST)
        program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / "model.pt2"), inductor_configs={"freezing": True}
        )
        os.chmod(made, 0o644)
        os.replace(made, path)
