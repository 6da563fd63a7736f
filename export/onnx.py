"""A trained network as one ONNX file with a free batch dimension."""

import contextlib
import io
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from harness.config import Normalization
from harness.step import Normalizer


class FromUint8(nn.Module):
    """uint8 images [N, H, W, 3] -> logits: the normalisation is part of the network."""

    def __init__(self, network: nn.Module, normalization: Normalization):
        super().__init__()
        self.network = network
        self.normalize = Normalizer(normalization, torch.device("cpu"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.normalize(images))


def export_onnx(network: nn.Module, example: torch.Tensor, path: Path, opset: int) -> None:
    """Write `network` (eval mode, float32, on the CPU) to `path`; `example`: inputs of a batch of two or more.

    Input `images`, output `logits`, weights inside the file. The opset is asserted and the file checked by
    onnx.checker before it gets its name. Raises ValueError where the exporter gave another opset.
    """
    import onnx

    assert not network.training
    assert len(example) > 1, "a batch of one would be taken for a constant"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        program.save(temporary, external_data=False)
        model = onnx.load(temporary)
        found = {entry.domain: entry.version for entry in model.opset_import}.get("")
        if found != opset:
            raise ValueError(f"export.opset={opset}: the exporter wrote opset {found}; give that one")
        onnx.checker.check_model(model, full_check=True)
        first = model.graph.input[0].type.tensor_type.shape.dim[0]
        if not first.dim_param:
            raise ValueError(f"{path.name}: the batch dimension came out fixed at {first.dim_value}")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
