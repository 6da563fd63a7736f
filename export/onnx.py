"""A trained network as one ONNX file with a free batch dimension."""

import contextlib
import io
import os
import tempfile
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn


def to_onnx(network: nn.Module, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    """`network` (eval mode, float32, on the CPU) with input `images`, output `logits` and a free batch dimension.

    `example`: inputs of a batch of two or more.
    """
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
    return program.model_proto


def save_onnx(model: onnx.ModelProto, path: Path, opset: int) -> None:
    """Write the model to `path`, weights inside the file.

    The opset is asserted and the model checked by onnx.checker before the file gets its name. Raises ValueError where
    the exporter gave another opset or fixed the batch dimension.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        onnx.save(model, temporary)
        model = onnx.load(temporary)  # what is on the disk is what is checked
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
