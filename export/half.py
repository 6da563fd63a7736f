"""Evaluates an ONNX file with each operator in the precision that the file specifies, as on a GPU.

onnxruntime has few float16 kernels for CPUs: it computes in float32 between casts, so a model that overflows float16
passes every check there. This is onnx's reference evaluator with its slowest operators replaced: convolutions and
matrix products sum in float32 and round once, as tensor cores do.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional

BATCH = 64

Sizes = Sequence[int] | None


def float16_logits(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Logits [N, classes] of images in the model's input format; not finite where a value overflows."""
    evaluator = ReferenceEvaluator(model, new_ops=[Conv, Gemm, MatMul, MaxPool])
    name = model.graph.input[0].name
    batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    with np.errstate(all="ignore"):  # the caller checks for non-finite logits
        return np.concatenate([evaluator.run(None, {name: batch})[0] for batch in batches])


def _float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _padded(x: np.ndarray, pads: Sequence[int] | None, value: float) -> torch.Tensor:
    """`x` [N, C, H, W] in float32, padded with `value` by `pads` (top, left, bottom, right)."""
    top, left, bottom, right = pads or (0, 0, 0, 0)
    return functional.pad(_float32(x), (left, right, top, bottom), value=value)


class Conv(OpRun):  # type: ignore[misc]  # onnx has no types
    """2D convolution."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        w: np.ndarray,
        b: np.ndarray | None = None,
        auto_pad: str | None = None,
        dilations: Sizes = None,
        group: int | None = None,
        kernel_shape: Sizes = None,
        pads: Sizes = None,
        strides: Sizes = None,
    ) -> tuple[np.ndarray]:
        assert auto_pad in (None, "NOTSET"), auto_pad  # PyTorch's exporter writes explicit pads
        bias = None if b is None else _float32(b)
        how: Any = {"stride": strides or 1, "dilation": dilations or 1, "groups": group or 1}
        return (functional.conv2d(_padded(x, pads, 0.0), _float32(w), bias, **how).numpy().astype(x.dtype),)


class Gemm(OpRun):  # type: ignore[misc]  # onnx has no types
    op_domain = ""

    def _run(
        self,
        a: np.ndarray,
        b: np.ndarray,
        c: np.ndarray | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        transA: int | None = None,
        transB: int | None = None,
    ) -> tuple[np.ndarray]:
        left, right = a.astype(np.float32), b.astype(np.float32)
        found = (1.0 if alpha is None else alpha) * ((left.T if transA else left) @ (right.T if transB else right))
        if c is not None:
            found = found + (1.0 if beta is None else beta) * c.astype(np.float32)
        return (found.astype(a.dtype),)


class MatMul(OpRun):  # type: ignore[misc]  # onnx has no types
    op_domain = ""

    def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
        return ((a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype),)


class MaxPool(OpRun):  # type: ignore[misc]  # onnx has no types
    """2D max pooling, without indices."""

    op_domain = ""

    def _run(
        self,
        x: np.ndarray,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sizes = None,
        kernel_shape: Sizes = None,
        pads: Sizes = None,
        storage_order: int | None = None,
        strides: Sizes = None,
    ) -> tuple[np.ndarray]:
        assert auto_pad in (None, "NOTSET"), auto_pad
        padded = _padded(x, pads, -np.inf)
        how: Any = {"kernel_size": kernel_shape, "stride": strides or 1, "dilation": dilations or 1}
        found = functional.max_pool2d(padded, ceil_mode=bool(ceil_mode), **how)
        return (found.numpy().astype(x.dtype),)
