"""Exports a trained network as one ONNX file with a dynamic batch dimension."""

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn

from harness.config.errors import raised_at


def to_onnx(network: nn.Module, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    """Export `network` (eval mode, float32, on the CPU): input `images`, output `logits`, dynamic batch dimension.

    `example`: images [N, 3, H, W], N >= 2. Raises RuntimeError where PyTorch cannot export it, with the line of the
    network that is the reason.
    """
    assert not network.training
    assert len(example) > 1, "a batch of one would be taken for a constant"
    with _quiet():
        try:
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
        except Exception as error:
            raise RuntimeError(f"PyTorch cannot export the network: {_cause(error)}") from error
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints and logs about its internals."""
    before = logging.root.manager.disable
    text = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _cause(error: BaseException) -> str:
    """The first line of the first error in a chain, and the line of a user's file that it comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{raised_at(error)}"


def save_onnx(model: onnx.ModelProto, path: Path, opset: int) -> None:
    """Write the model to `path`, weights inside the file.

    The model is checked (opset, onnx.checker) before the file is renamed to `path`. Raises ValueError where the
    exporter wrote another opset or fixed the batch dimension.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        onnx.save(model, temporary)
        model = onnx.load(temporary)  # check the file as written to disk
        found = {entry.domain: entry.version for entry in model.opset_import}.get("")
        if found != opset:
            raise ValueError(f"export.opset={opset}: the exporter wrote opset {found}; set export.opset={found}")
        onnx.checker.check_model(model, full_check=True)
        first = model.graph.input[0].type.tensor_type.shape.dim[0]
        if not first.dim_param:
            raise ValueError(f"{path.name}: the batch dimension came out fixed at {first.dim_value}")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
