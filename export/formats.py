"""Formats of exported files: how each is made from the trained network, and how it is written.

Each takes normalised float32 images [N, 3, H, W]; a second version normalises inside and takes uint8 [N, H, W, 3].
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from export import aoti, half
from export.lookup import with_tables
from export.onnx import save_onnx, to_onnx
from export.parity import compare_logits
from export.quantize import NotPossible, onnxruntime_logits, quantize
from export.rewrite import rewrite
from harness.config import Export, Normalization
from harness.run.storage import Json
from harness.stats.accuracy import Gate

__all__ = ["CALIBRATION_IMAGES", "FORMATS", "Format", "NotPossible", "Source", "with_normalization"]

CALIBRATION_IMAGES = 512
HALF_IMAGES = 1000  # validation images on which a float16 file is checked in float16 arithmetic


@dataclass
class Source:
    """Inputs from which files are made: the network in eval mode on the CPU, and images.

    Images are normalised float32 [N, 3, H, W]: `example` has two; `calibration`, from the training split, shows the
    ranges of activations; `validation` with `labels` [N] decides which layers cost too much accuracy.
    """

    network: nn.Module
    example: torch.Tensor
    calibration: np.ndarray
    validation: np.ndarray
    labels: np.ndarray
    normalization: Normalization
    settings: Export
    _plain: onnx.ModelProto | None = None

    def plain(self) -> onnx.ModelProto:
        """The ONNX model as PyTorch exports it, made on first use."""
        if self._plain is None:
            self._plain = to_onnx(self.network, self.example, self.settings.opset)
        return self._plain

    def logits(self, model: onnx.ModelProto) -> np.ndarray:
        """Logits of the validation images, in onnxruntime."""
        return onnxruntime_logits(model, self.validation)


Made = tuple[Any, Json]  # a model for `save`, and more fields for its manifest entry


@dataclass(frozen=True)
class Format:
    """A file format. `suffix`: of the file's name; `exact`: logits equal PyTorch's up to float32 rounding."""

    suffix: str
    precision: str
    make: Callable[[Source], Made]
    kind: str = "onnx"

    @property
    def exact(self) -> bool:
        return self.precision == "float32"

    def file(self, uint8: bool = False) -> str:
        return f"model{self.suffix}{'_uint8' if uint8 else ''}{'.pt2' if self.kind == 'aoti' else '.onnx'}"

    def save(self, model: Any, path: Path, source: Source, uint8: bool = False) -> None:
        if self.kind == "aoti":
            aoti.save_aoti(model, path, source.example, source.normalization if uint8 else None)
        else:
            save_onnx(with_normalization(model, source.normalization) if uint8 else model, path, source.settings.opset)


def _int8(source: Source) -> Made:
    rewritten = rewrite(source.plain())
    expected = source.logits(rewritten)

    def judge(model: onnx.ModelProto) -> Gate:
        allowed = source.settings.max_accuracy_drop
        return compare_logits(source.logits(model), expected, source.labels, allowed).gate

    made, kept = quantize(rewritten, source.calibration, judge)
    return with_tables(made), {"float32_layers": kept}


def _fp16(source: Source) -> Made:
    """Weights and arithmetic in float16, float32 in and out: for CUDA, whose tensor cores then run twice as fast.

    Made from the graph as PyTorch exports it: the one rewritten for CPUs has intermediate values that overflow float16.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxscript import ir
    from onnxscript.ir.passes.common import LiftConstantsToInitializersPass

    plain = ir.from_proto(source.plain())
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(plain)  # other constants stay float32
    made = ir.from_proto(convert_float_to_float16(ir.to_proto(plain), keep_io_types=True))
    made.graph.sort()  # the converter appends its casts at the end, after the nodes that use them
    model = ir.to_proto(made)
    del model.graph.value_info[:]  # it describes float32 tensors
    images, labels = source.validation[:HALF_IMAGES], source.labels[:HALF_IMAGES]
    try:
        logits = half.float16_logits(model, images)
    except Exception as error:  # the evaluator does not implement every operator
        raise NotPossible(f"cannot be checked in float16 arithmetic: {type(error).__name__}: {error}") from error
    expected = onnxruntime_logits(source.plain(), images)
    if not np.isfinite(logits).all():
        raise NotPossible("overflows float16: logits of validation images are not finite")
    found = compare_logits(logits, expected, labels, source.settings.max_accuracy_drop).record().to_json()
    told = ("images", "accuracy", "torch_accuracy", "top1_agreement", "max_logit_difference")
    return model, {"float16_arithmetic": {name: found[name] for name in told}}


FORMATS = {
    "onnx": Format("", "float32", lambda source: (source.plain(), {})),
    "onnx_rewritten": Format("_rewritten", "float32", lambda source: (rewrite(source.plain()), {})),
    "onnx_int8": Format("_int8", "int8", _int8),
    "onnx_fp16": Format("_fp16", "float16", _fp16),
    "aoti": Format("", "float32", lambda source: (aoti.checked(source.network), {}), kind="aoti"),
}


def with_normalization(model: onnx.ModelProto, normalization: Normalization) -> onnx.ModelProto:
    """The model preceded by (pixel / 255 - mean) / std: its input becomes uint8 [batch, H, W, 3]."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    (images,) = graph.input
    batch, _, height, width = images.type.tensor_type.shape.dim
    std, mean = np.array(normalization.std), np.array(normalization.mean)
    for name, values in (("normalization/scale", 1 / (255 * std)), ("normalization/shift", -mean / std)):
        graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name == images.name:
                node.input[position] = "normalization/images"
    steps = [
        onnx.helper.make_node("Cast", [images.name], ["normalization/float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", ["normalization/float", "normalization/scale"], ["normalization/scaled"]),
        onnx.helper.make_node("Add", ["normalization/scaled", "normalization/shift"], ["normalization/shifted"]),
        onnx.helper.make_node("Transpose", ["normalization/shifted"], ["normalization/images"], perm=[0, 3, 1, 2]),
    ]
    nodes = [*steps, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    shape = [batch.dim_param, height.dim_value, width.dim_value, 3]
    images.CopyFrom(onnx.helper.make_tensor_value_info(images.name, onnx.TensorProto.UINT8, shape))
    return found
