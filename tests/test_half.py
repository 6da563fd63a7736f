"""Files in half precision, in arithmetic that rounds as a GPU's does: onnxruntime on a CPU computes in float32."""

import numpy as np
import onnx
import pytest
import torch
from networks import SIDE, network, plain

from export import half
from export.formats import FORMATS, NotPossible, Source
from export.rewrite import rewrite
from export.runtimes.onnxruntime import shape_nodes
from harness.config import Export, Normalization, plugins

IMAGES = 32


def source_of(name: str, model: onnx.ModelProto | None = None) -> Source:
    """Of a network with images twice as large as usual, so that half precision has something to get wrong."""
    torch.manual_seed(0)
    images = 2 * torch.randn(IMAGES, 3, SIDE, SIDE).numpy()
    labels = np.zeros(IMAGES, np.int64)
    example = torch.randn(2, 3, SIDE, SIDE)
    given = model or plain(name)
    return Source(network(name), example, images, images, labels, Normalization(), Export(), _plain=given)


@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_every_network_answers_in_half_precision(name):
    source = source_of(name)
    model, told = FORMATS["onnx_fp16"].make(source)
    with torch.inference_mode():
        exact = source.network.double()(torch.from_numpy(source.validation).double()).numpy()
    scale = np.abs(exact).max()
    assert np.abs(half.float16_logits(model, source.validation) - exact).max() < 0.02 * scale
    assert told["float16_arithmetic"]["max_logit_difference"] < 0.02 * scale
    # Nothing but the images and the logits is cast: whatever stays in float32 would cost two casts and its speed.
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    float32 = {"Resize"}  # of which onnxruntime's converter says that it computes no other
    assert len(casts) <= 2 + 2 * sum(node.op_type in float32 for node in model.graph.node)


@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_the_evaluator_answers_like_pytorch(name):
    """In float32, where nothing but the order of sums differs."""
    source = source_of(name)
    with torch.inference_mode():
        expected = source.network(torch.from_numpy(source.validation)).numpy()
    found = half.float16_logits(source.plain(), source.validation)
    assert np.abs(found - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())


def test_what_overflows_is_not_exported():
    """The planted fault is the graph that is rewritten for CPUs: Mish by e(e + 2), beyond float16 from 5.6 on."""
    source = source_of("final")
    with torch.no_grad():
        source.network[0].weight.mul_(12)  # type: ignore[operator, union-attr]
    from export.onnx import to_onnx

    source._plain = to_onnx(source.network, source.example, 20)
    model, _ = FORMATS["onnx_fp16"].make(source)
    assert np.isfinite(half.float16_logits(model, source.validation)).all()
    source._plain = rewrite(source.plain())
    with pytest.raises(NotPossible, match="overflows float16"):
        FORMATS["onnx_fp16"].make(source)


def test_sums_are_in_float32_and_results_in_float16():
    """1,000 ones more than 2,048: a float16 sum would stop there; 70,000 is beyond float16."""
    text = """<ir_version: 9, opset_import: ["" : 20]> g (float16[1, n] x, float16[n, 1] w) => (float16[1, 1] y)
    { y = MatMul(x, w) }"""
    model = onnx.parser.parse_model(text)
    for count, expected in ((3048, 3048.0), (70_000, np.inf)):
        weights = onnx.numpy_helper.from_array(np.ones((count, 1), np.float16), "w")
        one = onnx.ModelProto()
        one.CopyFrom(model)
        one.graph.initializer.append(weights)
        del one.graph.input[1]
        assert half.float16_logits(one, np.ones((1, count), np.float16)).item() == expected


@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_nodes_that_compute_shapes(name):
    """What onnxruntime computes on the CPU for a GPU touches no image: a few integers, for Resize's sizes here."""
    model = plain(name)
    found = {node.op_type for node in model.graph.node if node.name in shape_nodes(model)}
    assert found == ({"Shape", "Concat"} if name == "transfer" else set())


def test_a_node_that_touches_images_computes_no_shape():
    graph = """<ir_version: 9, opset_import: ["" : 20]> g (float[n, 4] x) => (float[n, 4] y) {
        [size] s = Shape(x) [two] t = Mul(s, s) [shaped] z = Reshape(x, t)
        [cast] c = Cast<to = 1>(s) [scaled] y = Mul(z, c)
    }"""
    assert shape_nodes(onnx.parser.parse_model(graph)) == {"size", "two", "cast"}
