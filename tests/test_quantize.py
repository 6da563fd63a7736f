"""Eight bits: the layers that were asked for, answers that stay close, and faults that show."""

import numpy as np
import onnx
import pytest
import torch
from networks import SIDE, plain

from export.formats import NotPossible
from export.lookup import with_tables
from export.onnx import to_onnx
from export.quantize import Quantizer, onnxruntime_logits, quantize
from export.rewrite import rewrite
from harness.config import Trial, plugins
from harness.stats.accuracy import Gate
from harness.training.network import build_network


def small_network():
    torch.manual_seed(0)
    options = {"widths": [[8, 8], [16, 16]], "hidden": [32]}
    return build_network(Trial(architecture="final", options=options), 10, SIDE).eval()


@pytest.fixture(scope="module")
def quantizer(tmp_path_factory):
    images = torch.randn(64, 3, SIDE, SIDE)
    return Quantizer(rewrite(to_onnx(small_network(), images[:2], 20)), images.numpy(), tmp_path_factory.mktemp("int8"))


def gate(lost, images=1000):
    return Gate.of(lost, 0, images, 0.005)


def relative_error(model, images):
    with torch.inference_mode():
        expected = small_network()(torch.from_numpy(images)).numpy()
    found = onnxruntime_logits(model, images)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(0)))


def test_quantised_layers_are_those_asked_for(quantizer):
    assert len(quantizer.layers) == 4 + 2
    model = quantizer.quantized(quantizer.layers[1:3])
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert sum(w.dtype == np.int8 and w.ndim == 4 for w in weights.values()) == 2
    assert (
        0
        < relative_error(model, quantizer.calibration)
        < relative_error(quantizer.quantized(quantizer.layers), quantizer.calibration)
    )


def test_all_layers_stay_close(quantizer):
    assert relative_error(quantizer.quantized(quantizer.layers), quantizer.calibration) < 0.3


def test_tables_give_the_same_answers(quantizer):
    """With every layer in eight bits and with some; any batch size."""
    for layers in (quantizer.layers, quantizer.layers[1:], quantizer.layers[:3]):
        model = quantizer.quantized(layers)
        found = with_tables(model)
        assert ("Exp" in {node.op_type for node in found.graph.node}) == (len(layers) < len(quantizer.layers))
        onnx.checker.check_model(found, full_check=True)
        for count in (1, 3, 64):
            images = quantizer.calibration[:count]
            assert np.array_equal(onnxruntime_logits(found, images), onnxruntime_logits(model, images))


@pytest.mark.slow
@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_tables_in_every_network(name, tmp_path):
    images = torch.randn(16, 3, SIDE, SIDE).numpy()
    quantizer = Quantizer(rewrite(plain(name)), images, tmp_path)
    model = quantizer.quantized(quantizer.layers)
    assert np.array_equal(onnxruntime_logits(with_tables(model), images), onnxruntime_logits(model, images))


def test_a_wrong_table_shows(quantizer):
    model = with_tables(quantizer.quantized(quantizer.layers))
    table = next(i for i in model.graph.initializer if i.name.endswith("/table"))
    values = onnx.numpy_helper.to_array(table)[:, ::-1]
    table.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), table.name))
    assert relative_error(model, quantizer.calibration) > 0.6


@pytest.mark.parametrize("fault", ["channels swapped", "ranges of other images"])
def test_a_wrong_quantisation_shows(quantizer, fault, tmp_path):
    """What the check of accuracy is there for: errors far beyond those of eight bits."""
    if fault == "channels swapped":
        model = quantizer.quantized(quantizer.layers)
        scales = next(i for i in model.graph.initializer if i.name.endswith("_scale") and i.dims == [16])
        values = onnx.numpy_helper.to_array(scales)
        scales.CopyFrom(
            onnx.numpy_helper.from_array((values[::-1] * np.linspace(0.2, 5, 16)).astype(np.float32), scales.name)
        )
    else:
        model = Quantizer(quantizer.model, 0.05 * quantizer.calibration, tmp_path).quantized(quantizer.layers)
    assert relative_error(model, quantizer.calibration) > 0.6


def test_layers_that_cost_too_much_stay_in_float32(quantizer):
    """The most harmful first, and no more than needed."""
    order = quantizer.by_harm()
    assert sorted(order) == sorted(quantizer.layers)
    limit = 0.8 * relative_error(quantizer.quantized(quantizer.layers), quantizer.calibration)
    _, kept = quantize(
        quantizer.model,
        quantizer.calibration,
        lambda found: gate(lost=30 if relative_error(found, quantizer.calibration) > limit else 0),
    )
    assert 0 < len(kept) < len(order)
    assert kept == order[: len(kept)]
    with pytest.raises(NotPossible, match="every layer in int8 costs more"):
        quantize(quantizer.model, quantizer.calibration, lambda found: gate(lost=30))


@pytest.mark.parametrize(("images", "asked"), [(160, 1), (1000, 6)])
def test_too_few_images_leave_every_layer_in_eight_bits(quantizer, images, asked):
    """Where nothing can pass, the first that does not fail; where something might, only after all were tried."""
    judged = []

    def judge(model):
        judged.append(model)
        return gate(lost=2, images=images)

    _, kept = quantize(quantizer.model, quantizer.calibration, judge)
    assert (kept, len(judged)) == ([], asked)
