"""Every network exports, answers like the original at any batch size, and a wrong export is caught."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import SIDE, network, plain

from export import SERVED_BY, Artifact, parity
from export.exporter import export_winner
from export.formats import FORMATS, NotPossible, Source, with_normalization
from export.onnx import save_onnx, to_onnx
from export.rewrite import rewrite
from harness.config import Export, Normalization, Trial, plugins
from harness.data.batches import Normalizer
from harness.run import system
from harness.run.directory import RunDirectory
from harness.run.manifest import FileEntry, Manifest
from harness.run.progress import Progress


def answers(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_every_network_answers_the_same(name, tmp_path):
    original, path = network(name), tmp_path / "model.onnx"
    save_onnx(plain(name), path, 20)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]  # weights inside, no temporary file left
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == 20
    for batch in (1, 2, 3, 7, 64):
        images = torch.randn(batch, 3, SIDE, SIDE)
        with torch.inference_mode():
            expected = original(images).numpy()
        found = parity.compare_logits(answers(path, images.numpy()), expected, np.zeros(batch, int))
        assert found.outcome == "passes", found


def test_rewritten_mish_is_mish():
    """Everywhere, to a rounding error or two of float32."""
    x = np.concatenate([np.linspace(-120, 120, 200_001), [-1e30, -1e4, 1e4, 1e30, 0.0, -0.0, 1e-30]]).astype(np.float32)
    graph = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Mish(x) }'
    )
    session = onnxruntime.InferenceSession(rewrite(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    exact = torch.nn.functional.mish(torch.from_numpy(x).double()).numpy()
    assert (np.abs(session.run(None, {"x": x})[0] - exact) <= 4e-7 * np.maximum(1, np.abs(exact))).all()


@pytest.mark.parametrize("cut", [20.0, 0.0])
def test_a_wrong_rewrite_is_caught(tmp_path, monkeypatch, cut):
    monkeypatch.setattr("export.rewrite.CUT", cut)
    original, path, images = network("final"), tmp_path / "model.onnx", torch.randn(7, 3, SIDE, SIDE)
    original[-1].weight.data *= 100  # logits as large as those of a trained network
    save_onnx(rewrite(to_onnx(original, torch.randn(2, 3, SIDE, SIDE), 20)), path, 20)
    with torch.inference_mode():
        expected = original(images).numpy()
    found = parity.compare_logits(answers(path, images.numpy()), expected, np.zeros(7, int))
    assert found.outcome == ("passes" if cut == 20.0 else "fails")


@pytest.mark.parametrize("fault", ["none", "mean and deviation exchanged", "channels reversed"])
def test_normalisation_inside_the_graph(tmp_path, fault):
    right = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    wrong = {
        "none": right,
        "mean and deviation exchanged": Normalization(mean=right.std, std=right.mean),
        "channels reversed": Normalization(mean=right.mean[::-1], std=right.std[::-1]),
    }
    original, path = network("model1"), tmp_path / "uint8.onnx"
    images = torch.randint(0, 256, (5, SIDE, SIDE, 3), dtype=torch.uint8)
    save_onnx(with_normalization(plain("model1"), wrong[fault]), path, 20)
    mean, std = (torch.tensor(v)[:, None, None] for v in (right.mean, right.std))
    with torch.inference_mode():
        expected = original((images.permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    found = parity.compare_logits(answers(path, images.numpy()), expected, np.zeros(5, int))
    assert found.outcome == ("passes" if fault == "none" else "fails")
    assert (
        plain("model1").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    )  # the given one is left alone


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "aoti" else k for k in FORMATS])
@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_every_network_in_every_format(name, kind, tmp_path):
    """Made, saved, loaded and run, both ways of taking images; exact ones answer the same."""
    original, made = network(name), FORMATS[kind]
    pixels = torch.randint(0, 256, (32, SIDE, SIDE, 3), dtype=torch.uint8)
    normalization = Trial().normalization
    images = Normalizer(normalization, torch.device("cpu"), "contiguous")(pixels).numpy()
    example, labels = torch.randn(2, 3, SIDE, SIDE), np.zeros(32, int)
    settings = Export(max_accuracy_drop=0.99)
    source = Source(original, example, images, images, labels, normalization, settings, plain(name))
    model, _ = made.make(source)
    if kind in ("onnx_rewritten", "onnx_int8"):
        assert "Mish" not in {node.op_type for node in model.graph.node}
    with torch.inference_mode():
        expected = original(torch.from_numpy(images)).numpy()
    for uint8 in (False, True):
        file = made.file(uint8)
        made.save(model, tmp_path / file, source, uint8)
        described = {"id": "x", "config": {}, "weights_sha256": None, "classes": [], "input_size": SIDE}
        environment = system.environment().to_json()
        manifest = Manifest(**described, environment=environment, files={file: FileEntry(format=made.kind)})
        load = plugins.load("export.runtimes", SERVED_BY[made.kind], "load")
        predict = load(Artifact(tmp_path, manifest, file), "cpu", 2)
        logits = predict(pixels.numpy() if uint8 else images)
        strided = (pixels.numpy() if uint8 else images).swapaxes(1, 2).copy().swapaxes(1, 2)
        assert np.array_equal(predict(strided), logits)
        found = parity.compare_logits(logits, expected, labels, None if made.exact else 0.99)
        assert found.outcome != "fails", found
        assert np.abs(logits - expected).max() < 0.3 * np.abs(expected).max()
        assert predict((pixels.numpy() if uint8 else images)[:1]).shape == (1, 10)
        if kind == "aoti" and name != "baseline":
            break  # it takes half a minute to compile
    assert not {path.name for path in tmp_path.iterdir()} - {made.file(), made.file(True)}


@pytest.mark.parametrize("opset", [18, 21])
def test_opset_is_the_one_asked_for(tmp_path, opset):
    path = tmp_path / "model.onnx"
    save_onnx(to_onnx(network("baseline"), torch.randn(2, 3, SIDE, SIDE), opset), path, opset)
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == opset


def test_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    monkeypatch.setattr("onnx.checker.check_model", lambda *a, **k: (_ for _ in ()).throw(ValueError("bad graph")))
    with pytest.raises(ValueError, match="bad graph"):
        save_onnx(to_onnx(network("baseline"), torch.randn(2, 3, SIDE, SIDE), 20), path, 20)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_parity_of_known_logits():
    reference = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.4999]])
    found = parity.compare_logits(reference + [[0, 0], [1e-4, 0], [0, 2e-4]], reference, np.array([0, 1, 1]))
    assert found.max_logit_difference == pytest.approx(2e-4)
    assert found.disagreeing == [2]
    assert (found.accuracy, found.torch_accuracy) == (1.0, pytest.approx(2 / 3))
    assert found.outcome == "passes"


@pytest.mark.parametrize("fault", [np.nan, np.inf, 2e-3])
def test_parity_catches_one_wrong_logit(fault):
    reference = np.random.default_rng(0).normal(size=(100, 10))
    wrong = reference.copy()
    wrong[37, 4] += fault
    assert parity.compare_logits(wrong, reference, np.zeros(100, int)).outcome == "fails"


def test_parity_catches_a_changed_weight(tmp_path):
    original, path = network("model1"), tmp_path / "model.onnx"
    images = torch.randn(16, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = original(images).numpy()
    with torch.no_grad():
        next(original.parameters())[0, 0, 0, 0] += 0.05
    save_onnx(to_onnx(original, images, 20), path, 20)
    assert parity.compare_logits(answers(path, images.numpy()), expected, np.zeros(16, int)).outcome == "fails"


def test_confusion_counts_every_image():
    logits = np.eye(3)[[0, 1, 1, 2]]
    assert parity.confusion_counts(logits, np.array([0, 0, 1, 2])).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_accuracy_within_what_is_allowed():
    """Paired by image: 3 lost and 1 gained of 1,000."""
    labels = np.zeros(1000, int)
    reference = np.tile([1.0, 0.0], (1000, 1))
    reference[0] = [0.0, 1.0]
    logits = reference.copy()
    logits[[0, 1, 2, 3]] = logits[[0, 1, 2, 3], ::-1]
    found = parity.compare_logits(logits, reference, labels, allowed_drop=0.01)
    assert (found.lost, found.gained) == (3, 1)
    assert found.gate.change.mean == pytest.approx(-0.002)
    assert found.outcome == "passes"
    outcomes = {
        allowed: parity.compare_logits(logits, reference, labels, allowed).outcome for allowed in (0.004, 0.0, None)
    }
    assert outcomes == {0.004: "too few images", 0.0: "too few images", None: "fails"}
    assert parity.compare_logits(np.full_like(logits, np.nan), reference, labels, allowed_drop=1.0).outcome == "fails"
    record = found.record()
    assert (record.outcome, record.passed, record.lost) == ("passes", True, 3)


def test_a_format_that_is_not_possible_is_listed_as_absent(small_run, tmp_path, monkeypatch):
    """The other files are exported all the same, and asking again with the same settings does nothing."""
    shutil.copytree(small_run[0], tmp_path / "run")
    run, settings, progress = RunDirectory(tmp_path / "run"), Export(uint8=False, max_accuracy_drop=0.001), Progress()
    (manifest,) = run.path.glob("exported/*/manifest.json")

    def impossible(*_):
        raise NotPossible("too harmful")

    monkeypatch.setattr("export.formats.quantize", impossible)
    export_winner(run, settings, progress)
    found = json.loads(manifest.read_text())
    assert found["absent"] == {"onnx_int8": "too harmful"}
    assert set(found["files"]) == {"model.safetensors", "model.onnx", "model_rewritten.onnx"}
    there = {path.name for path in manifest.parent.iterdir()}
    assert there == {*found["files"], "manifest.json", "reference.npy", "mistakes.npy", "checks"}
    before = manifest.stat().st_mtime_ns
    export_winner(run, settings, progress)
    assert manifest.stat().st_mtime_ns == before
