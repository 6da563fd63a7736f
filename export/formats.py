"""The files that an export consists of, as ONNX models made from the one that PyTorch writes.

Each as it is, for normalised float32 images [N, 3, H, W], and with the normalisation inside, for uint8 [N, H, W, 3].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from export.quantize import answers, quantize
from export.rewrite import rewrite
from harness.config import Export, Normalization

CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Images:
    """Normalised float32 images [N, 3, H, W]: `calibration`, from the training part, show what ranges activations have;
    `validation` with `labels` [N] decide which layers cost too much accuracy."""

    calibration: np.ndarray
    validation: np.ndarray
    labels: np.ndarray


Made = tuple[onnx.ModelProto, dict[str, Any]]  # and what the manifest says of it beside


def _plain(model: onnx.ModelProto, images: Images, settings: Export) -> Made:
    return model, {}


def _rewritten(model: onnx.ModelProto, images: Images, settings: Export) -> Made:
    return rewrite(model), {}


def _int8(model: onnx.ModelProto, images: Images, settings: Export) -> Made:
    rewritten = rewrite(model)

    def accuracy(of: onnx.ModelProto) -> float:
        return float((answers(of, images.validation).argmax(1) == images.labels).mean())

    least = accuracy(rewritten) - settings.max_accuracy_drop
    made, kept = quantize(rewritten, images.calibration, accuracy, least)
    return made, {"float32_layers": kept}


@dataclass(frozen=True)
class Format:
    """`suffix`: of the file's name; `exact`: answers as PyTorch does but for rounding in float32."""

    suffix: str
    precision: str
    make: Callable[[onnx.ModelProto, Images, Export], Made]

    @property
    def exact(self) -> bool:
        return self.precision == "float32"


FORMATS = {
    "onnx": Format("", "float32", _plain),
    "onnx_rewritten": Format("_rewritten", "float32", _rewritten),
    "onnx_int8": Format("_int8", "int8", _int8),
}


def with_normalization(model: onnx.ModelProto, normalization: Normalization) -> onnx.ModelProto:
    """The model behind pixel / 255, minus mean, over standard deviation: its input becomes uint8 [batch, H, W, 3]."""
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
