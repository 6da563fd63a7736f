"""Every runtime answers like PyTorch with the exported files, and so does `python -m export.predict`."""

import json

import numpy as np
import pytest
import torch
from conftest import here
from networks import SIDE
from PIL import Image

from export import Artifact, parity
from export.formats import FORMATS
from export.runtimes import Unavailable
from harness.config import Export, plugins
from harness.run import storage
from harness.run.manifest import Manifest


@pytest.fixture(scope="module")
def exported(small_run):
    run, _ = small_run
    folder = next((run / "exported").glob("*/"))
    return folder, Manifest.read(folder / "manifest.json")


COMPILED = ("torch_freezing", "torch_max_autotune", "torch_bfloat16")  # as torch_compile, with other settings


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in COMPILED else n for n in plugins.names("export.runtimes")],
)
def test_every_runtime_answers_like_the_reference(name, exported):
    folder, manifest = exported
    kind = plugins.load("export.runtimes", name, "FORMAT")
    files = [f for f, entry in manifest.files.items() if entry.format == kind and entry.input.normalized]
    assert files or kind == "aoti", f"no file of format {kind} to serve"
    if not files:
        pytest.skip("is not exported by default; tested with the formats")
    images = torch.randn(9, 3, SIDE, SIDE).numpy()
    reference = plugins.load("export.runtimes", "torch_eager", "load")(
        Artifact(folder, manifest, "model.safetensors"), "cpu", 2
    )
    try:
        predict = plugins.load("export.runtimes", name, "load")(Artifact(folder, manifest, files[0]), "cpu", 2)
    except Unavailable as reason:
        pytest.skip(str(reason))
    if plugins.load("export.runtimes", name, "PRECISION", "float32") == "float32":
        assert parity.compare_logits(predict(images), reference(images), np.zeros(9, int)).outcome == "passes"
    else:
        assert np.abs(predict(images) - reference(images)).max() < 0.05 * np.abs(reference(images)).max()


@pytest.mark.parametrize("name", plugins.names("export.runtimes"))
def test_no_runtime_falls_back_silently(name, exported):
    folder, manifest = exported
    kind = plugins.load("export.runtimes", name, "FORMAT")
    file = next((f for f, entry in manifest.files.items() if entry.format == kind), "model.pt2")
    with pytest.raises(Unavailable):
        plugins.load("export.runtimes", name, "load")(Artifact(folder, manifest, file), "cuda", 2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", plugins.names("export.runtimes"))
def test_every_runtime_on_cuda(name, exported):
    folder, manifest = exported
    kind = plugins.load("export.runtimes", name, "FORMAT")
    file = next((f for f, entry in manifest.files.items() if entry.format == kind), None)
    if file is None:
        pytest.skip("for the CPU")
    images = torch.randn(9, 3, SIDE, SIDE).numpy()
    load = plugins.load("export.runtimes", "torch_eager", "load")
    expected = load(Artifact(folder, manifest, "model.safetensors"), "cpu", 2)(images)
    try:
        found = plugins.load("export.runtimes", name, "load")(Artifact(folder, manifest, file), "cuda", 2)(images)
    except Unavailable as reason:
        if name not in ("openvino", "tensorrt"):  # others are here, or something is wrong
            raise
        pytest.skip(str(reason))
    exact = plugins.load("export.runtimes", name, "PRECISION", "float32") == "float32"
    assert np.abs(found - expected).max() < (1e-3 if exact else 0.05 * np.abs(expected).max())  # float32 is no TF32


def test_torch_compile_without_a_compiler_is_absent(exported, monkeypatch):
    folder, manifest = exported
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(Unavailable, match=r"C\+\+ compiler"):
        plugins.load("export.runtimes", "torch_compile", "load")(
            Artifact(folder, manifest, "model.safetensors"), "cpu", 2
        )


def test_manifest_agrees_with_the_files(exported):
    folder, _ = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    onnx_files = {FORMATS[kind].file(uint8) for kind in Export().formats for uint8 in (False, True)}
    assert set(manifest["files"]) == {"model.safetensors", *onnx_files}
    for name, entry in manifest["files"].items():
        assert storage.sha256(folder / name) == entry["sha256"]
        assert entry["bytes"] == (folder / name).stat().st_size
    names = {"images", "accuracy", "torch_accuracy", "top1_agreement", "max_logit_difference"}
    for name in onnx_files:
        assert names <= set(manifest["files"][name]["parity"])
        assert manifest["files"][name]["opset"] == 20
    assert manifest["classes"] == list("0123456789")
    assert manifest["normalization"] == {"mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture
def image(tmp_path):
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[0] * 16).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR).save(tmp_path / "zero.png")
    return tmp_path / "zero.png"


def test_predict_says_the_same_from_every_file(exported, image):
    folder, manifest = exported
    lines = set()
    for name in manifest.files:
        done = here("export.predict", f"model={folder / name}", f"image=[{image},{image}]", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 2
        lines |= {line.rsplit(" ", 1)[0] for line in done.stdout.splitlines()}
    assert len(lines) == 1
    path, predicted = lines.pop().split()
    assert path == str(image)
    assert predicted in manifest.classes


def test_predict_refuses_what_it_cannot_serve(exported, image, tmp_path):
    folder, _ = exported
    (tmp_path / "manifest.json").write_text((folder / "manifest.json").read_text())
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1] + b"x")
    for arguments, message in (
        ([f"model={tmp_path}/model.onnx", f"image={image}"], "its SHA-256 differs from manifest.json"),
        ([f"model={tmp_path}/other.onnx", f"image={image}"], "no such exported file"),
        ([f"model={image}", f"image={image}"], "no such exported file"),
        ([f"model={folder}/model.onnx", "image=/no/image.png"], "is no file"),
        ([f"model={folder}/model.onnx", f"image={tmp_path}/manifest.json"], "cannot be read as an image"),
        ([f"model={folder}/model.onnx"], "image is missing"),
    ):
        done = here("export.predict", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert message in done.stderr
