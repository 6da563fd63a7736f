"""Which code a result belongs to: files of one name in different folders do not mix, and a network that was edited
after training is not exported, measured or looked at."""

import shutil
import sys

import numpy as np
import pytest
from conftest import exported

from export.exporter import Exporter, export_winner
from export.recorded import check_answers
from harness.config import BadInput, Export, Trial
from harness.run import storage, trust
from harness.run.progress import Progress
from harness.run.provenance import code_digest, code_files
from harness.run.records import read_correct, write_trial
from harness.training.network import build_network

NET = """
{imports}
from torch import nn
def build(num_classes):
    {lazily}
    return nn.Sequential(nn.Flatten(), layers.middle(), nn.Linear(8, num_classes))
"""
LAYERS = "from torch import nn\ndef middle():\n    return nn.Sequential(nn.Linear(3072, 8), nn.{kind}())\n"

# Where the neighbour is imported, and its file.
NEIGHBOURS = {
    "a module": ("import layers", "pass", "layers.py"),
    "a module inside build": ("", "import layers", "layers.py"),
    "a package": ("import layers", "pass", "layers/__init__.py"),
    "a module of a package": ("from blocks import layers", "pass", "blocks/layers.py"),
    "a module with the name of an installed one": ("import filelock as layers", "pass", "filelock.py"),
}


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_neighbours_of_one_name_do_not_mix(kind, tmp_path, monkeypatch):
    """Two networks, each with a neighbour of the same name, built in turn in one process."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    imports, lazily, file = NEIGHBOURS[kind]
    trials = []
    for folder, activation in (("first", "ReLU"), ("second", "Tanh")):
        place = tmp_path / folder
        (place / file).parent.mkdir(parents=True)
        (place / "net.py").write_text(NET.format(imports=imports, lazily=lazily))
        (place / file).write_text(LAYERS.format(kind=activation))
        trials.append(Trial(architecture=str(place / "net.py")))
    for _ in range(2):
        built = [repr(build_network(trial, 10, 32)) for trial in trials]
        assert ("ReLU" in built[0], "Tanh" in built[1]) == (True, True)
    digests = {code_digest(trial.architecture) for trial in trials}
    assert len(digests) == 2


@pytest.fixture
def own_run(run, tmp_path):
    """A run whose winner was trained with a net.py and its neighbour, both named by the user."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "net.py").write_text("import layers\nfrom architectures.baseline import build\nlayers.used()\n")
    (folder / "layers.py").write_text("def used():\n    pass\n")
    architecture = str(folder / "net.py")
    trust.remember(folder / "net.py")
    recorded = run.recorded()
    recorded.code = {architecture: code_files(architecture)}
    run._configure(recorded)
    for record in run.trials():
        file = run.trial_folder(record.id) / "trial.json"
        value = storage.read_json(file)
        value["config"]["architecture"] = architecture
        storage.write_json(file, value)
    return run, folder


EDITS = {
    "the network": ("net.py", "import layers\nfrom architectures.model1 import build\nlayers.used()\n"),
    "its neighbour": ("layers.py", "def used():\n    return 1\n"),
    "a new neighbour": ("net.py", "import layers, other\nfrom architectures.baseline import build\nlayers.used()\n"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_network_is_not_exported(edit, own_run, monkeypatch, capsys):
    from export.__main__ import main as export
    from harness.inspect import main as inspect

    run, folder = own_run
    name, text = EDITS[edit]
    (folder / "other.py").write_text("") if "other" in text else None
    (folder / name).write_text(text)
    before = exported(run).read_bytes()
    for command, more in ((export, []), (inspect, [f"image={folder}/net.py"])):
        monkeypatch.setattr(sys, "argv", ["x", f"run={run.path}", "trust=true", *more])
        assert command() == 2
        said = capsys.readouterr().err
        assert f"user/{'net.py, user/other.py' if 'other' in text else name} changed since trial" in said
        assert said.count("\n") == 1
    assert exported(run).read_bytes() == before


def test_weights_of_another_form_name_the_first_tensor(run, monkeypatch, capsys):
    """As when the network reads its widths from a file, which has changed."""
    from harness.training.network import restore_network

    record = next(r for r in run.trials() if r.id == exported(run).parent.name)
    wider = record.trial.model_copy(update={"options": {**record.trial.options, "hidden": [17]}})
    folder = run.trial_folder(record.id)
    with pytest.raises(
        BadInput, match=r"do not fit it \(size mismatch for .*: it, or a file that it reads, has changed"
    ):
        restore_network(folder, wider, record.weights_sha256, 10, 32)
    with pytest.raises(BadInput, match=r"do not fit it \(size mismatch for"):
        restore_network(folder, record.trial, record.weights_sha256, 11, 32)


def test_a_comment_is_no_edit(own_run):
    run, folder = own_run
    (folder / "layers.py").write_text("# says nothing\ndef used():\n    pass\n")
    record = run.trials()[0]
    trust.check_network_code(run, record)


def test_the_exported_accuracy_is_that_of_the_record(run):
    """A network that answers otherwise than the trained one, whatever changed, is not exported; where its trial has not
    read the test images, those of validation decide."""
    record = next(r for r in run.trials() if r.id == exported(run).parent.name)
    folder, images = run.trial_folder(record.id), run.recorded().data.test
    correct = read_correct(folder, record, images)
    assert correct is not None
    check_answers(record, folder, correct, pytest.fail)
    with pytest.raises(RuntimeError, match="test images otherwise than when it was trained: its code"):
        check_answers(record, folder, ~correct, pytest.fail)
    unread = record.model_copy(update={"correct_sha256": None})
    check_answers(unread, folder, correct, pytest.fail)
    unread.metrics = record.metrics.model_copy(update={"test_accuracy": None})
    same = np.arange(1000) < round(1000 * record.metrics.val_accuracy)
    check_answers(unread, folder, correct, lambda: same)
    with pytest.raises(RuntimeError, match="1,000 validation images otherwise than when it was trained"):
        check_answers(unread, folder, correct, lambda: np.zeros(1000, bool))


def test_a_search_alone_is_exported_by_its_validation(run):
    """Its trial has read no test images: the real network answers the validation images as recorded."""
    before = exported(run).parent
    record = next(r for r in run.trials() if r.id == before.name)
    record.metrics.test_accuracy = record.correct_sha256 = None
    write_trial(run.trial_folder(record.id), record)
    shutil.rmtree(before)
    export_winner(run, Export(formats=["onnx"], uint8=False, opset=18), Progress())
    assert exported(run).is_file()
    record.metrics.val_accuracy = 1.0
    write_trial(run.trial_folder(record.id), record)
    shutil.rmtree(before)
    with pytest.raises(RuntimeError, match="validation images otherwise than when it was trained"):
        export_winner(run, Export(formats=["onnx"], uint8=False, opset=18), Progress())


CRASH = {
    "onnxruntime crashes": ("its process crashed (SIGSEGV)", "RuntimeError"),
    "onnxruntime refuses the file": ("not implemented", "Unavailable"),
}


@pytest.mark.parametrize(
    "kind", ["onnxruntime crashes", *(pytest.param(n, marks=pytest.mark.slow) for n in [*CRASH][1:])]
)
def test_a_format_that_crashes_is_absent_and_the_others_are_there(kind, run, monkeypatch):
    from export import exporter
    from export.runtimes import Unavailable

    reason, error = CRASH[kind]
    real = exporter.RuntimeProcess.load

    def load(self, check, images):
        if "rewritten" in check.artifact.name:
            raise {"RuntimeError": RuntimeError, "Unavailable": Unavailable}[error](reason)
        return real(self, check, images)

    monkeypatch.setattr(exporter.RuntimeProcess, "load", load)
    export_winner(run, Export(formats=["onnx", "onnx_rewritten"], uint8=False, opset=18), Progress())
    manifest = storage.read_json(exported(run))
    assert reason in manifest["absent"]["onnx_rewritten"]
    assert set(manifest["files"]) == {"model.safetensors", "model.onnx"}
    assert not (exported(run).parent / "model_rewritten.onnx").exists()


@pytest.mark.parametrize("when", ["write_reference", "finish"])
def test_a_reexport_that_fails_loses_no_good_manifest(when, run, monkeypatch):
    before = {path.name: path.read_bytes() for path in exported(run).parent.glob("*") if path.is_file()}

    def fails(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Exporter, when, fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        export_winner(run, Export(opset=18), Progress())
    assert {path.name: path.read_bytes() for path in exported(run).parent.glob("*") if path.is_file()} == before
    assert not list(run.path.glob(".export-*"))
