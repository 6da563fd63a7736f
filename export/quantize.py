"""Quantises convolutions and matrix products to eight bits: static quantisation with calibrated ranges.

Uses onnxruntime's quantiser: QuantizeLinear and DequantizeLinear around the operators (QDQ), int8 weights with one
scale per output channel, uint8 activations with the range observed on training images. Layers that cost too much
accuracy stay in float32, the most harmful first, by the accuracy gate (harness/stats/accuracy.py) on validation images.
"""

import logging
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.parity import predict_all
from harness.stats.accuracy import Gate, can_pass

QUANTISED = ("Conv", "Gemm", "MatMul")
CALIBRATION_BATCH = 64

Judge = Callable[[onnx.ModelProto], Gate]


class NotPossible(Exception):
    """This network cannot be exported in this format here, or not within the allowed accuracy drop."""


class _Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, images: np.ndarray):
        self.batches = iter(np.array_split(images, max(1, len(images) // CALIBRATION_BATCH)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


class Quantizer:
    """Quantises a float32 model with input `images`, prepared once in an empty `folder`; `calibration`: training images
    in the model's input format."""

    def __init__(self, model: onnx.ModelProto, calibration: np.ndarray, folder: Path):
        self.calibration, self.folder = calibration, folder
        onnx.save(model, folder / "given.onnx")  # a model passed in memory would lose its weights
        quant_pre_process(folder / "given.onnx", folder / "prepared.onnx", skip_symbolic_shape=True)
        self.model = onnx.load(folder / "prepared.onnx")
        self.ranges = folder / "ranges.json"  # cached: calibration runs once for all selections of layers
        self.layers = [node.name for node in self.model.graph.node if node.op_type in QUANTISED]

    def quantized(self, layers: Collection[str]) -> onnx.ModelProto:
        """The model with these layers in int8."""
        to = self.folder / "quantized.onnx"
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # it advises pre-processing, which is done
        try:
            quantize_static(
                self.folder / "prepared.onnx",
                to,
                _Images(self.calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                nodes_to_quantize=list(layers),
                per_channel=True,
                reduce_range=not has_vnni(),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibration_cache_path=self.ranges,
            )
        finally:
            logging.root.setLevel(level)
        return onnx.load(to)

    def by_harm(self) -> list[str]:
        """Layers by how much each, alone in int8, changes the logits of the calibration images; most harmful first."""
        images = self.calibration[:256]
        reference = onnxruntime_logits(self.model, images)
        harm = {
            layer: float(np.square(onnxruntime_logits(self.quantized([layer]), images) - reference).mean())
            for layer in self.layers
        }
        return sorted(self.layers, key=lambda layer: -harm[layer])


def quantize(model: onnx.ModelProto, calibration: np.ndarray, judge: Judge) -> tuple[onnx.ModelProto, list[str]]:
    """The model with as many int8 layers as pass the accuracy gate of `judge`; and its float32 layers.

    The most harmful layers go back to float32 until the model passes. If none passes, as on too few images, it is the
    first that does not fail. Raises NotPossible where all fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        quantizer = Quantizer(model, calibration, Path(folder))
        layers, kept, harmful = list(quantizer.layers), list[str](), list[str]()
        undecided: tuple[onnx.ModelProto, list[str]] | None = None
        while layers:
            found = quantizer.quantized(layers)
            gate = judge(found)
            if gate.outcome == "passes":
                return found, kept
            if gate.outcome != "fails":
                undecided = undecided or (found, list(kept))
                if not can_pass(gate.change.n, gate.allowed):
                    break
            harmful = harmful or quantizer.by_harm()
            kept.append(harmful[len(kept)])
            layers.remove(kept[-1])
    if undecided is None:
        raise NotPossible("every layer in int8 costs more accuracy than is allowed")
    return undecided


def onnxruntime_logits(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Logits [N, classes] from onnxruntime on CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return predict_all(lambda batch: session.run(None, {"images": batch})[0], images)


def has_vnni() -> bool:
    """Whether this CPU sums products of eight-bit integers without saturation; if not, weights get seven bits."""
    import torch

    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return known.get("architecture") != "x86_64" or any(known.get(name) for name in ("avx512_vnni", "avx_vnni"))
