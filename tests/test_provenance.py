"""The digest of code follows its meaning: over every module that a trial's training imports, by mutation."""

import ast
import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import TOP, command

from harness.config import plugins
from harness.run.provenance import code_digest, code_files, meaning_digest

FILES = [name for name in code_files("final") if name.endswith((".py", ".cpp"))]
OPERATIONS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Gt: ast.LtE,
    ast.Lt: ast.GtE,
}
OPERATIONS |= {ast.Eq: ast.NotEq, ast.In: ast.NotIn, ast.Is: ast.IsNot, ast.And: ast.Or, ast.BitOr: ast.BitAnd}


def reworded(source: str, suffix: str) -> str:
    """Other comments, docstrings and formatting."""
    if suffix == ".cpp":
        return "/* another */ " + re.sub(r"//[^\n]*", "// reworded", source)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Expr(ast.Constant("Reworded."))
    return "# a comment\n" + ast.unparse(tree) + "\n# another\n"


class OneOperation(ast.NodeTransformer):
    """Changes the first operation, or where there is none the first constant that is not a docstring, or a name."""

    done = False

    def generic_visit(self, node):
        for field in ("op", "ops"):
            found = getattr(node, field, None)
            operator = found[0] if isinstance(found, list) and found else found
            if not self.done and type(operator) in OPERATIONS:
                changed = OPERATIONS[type(operator)]()
                setattr(node, field, [changed, *found[1:]] if isinstance(found, list) else changed)
                self.done = True
        return super().generic_visit(node)


def mutated(source: str, suffix: str) -> str | None:
    """One operation changed; None for a module that has nothing to change."""
    if suffix == ".cpp":
        before, operation, after = source.rpartition(" + ")  # the last one: the first may be in a comment
        return f"{before} - {after}" if operation else None
    tree, change = ast.parse(source), OneOperation()
    tree = change.visit(tree)
    if change.done:
        return ast.unparse(tree)
    for node in ast.walk(tree):  # a module of definitions alone
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.body.append(ast.Pass())
            return ast.unparse(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            node.value = ast.Constant("another")
            return ast.unparse(tree)
    return None


@pytest.mark.parametrize("name", FILES)
def test_a_comment_leaves_a_run_continuable_and_an_operation_does_not(name):
    source, suffix = (TOP / name).read_text(), name[name.rfind(".") :]
    digest = meaning_digest(source.encode(), suffix)
    assert meaning_digest(reworded(source, suffix).encode(), suffix) == digest
    changed = mutated(source, suffix)
    if changed is None:
        assert name.endswith("__init__.py")  # a docstring and imports
    else:
        assert meaning_digest(changed.encode(), suffix) != digest


TRAIN = """
import json, sys
from harness import Data, Trial, train
train(Trial(architecture="final", epochs=1, options={"widths": [[4, 8]], "hidden": [8]}), Data(name="digits", limit=20))
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
print(json.dumps(files))
"""
# Of the command that trains, not of training: they draw nothing and compute nothing of a trial.
AROUND = {"harness/training/api.py", "harness/training/network_check.py", "harness/training/answers.py"}


def test_every_module_that_training_imports_counts(tmp_path):
    done = command("-c", TRAIN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = {
        file.removeprefix(f"{TOP}/") for file in json.loads(done.stdout.splitlines()[-1]) if file.startswith(f"{TOP}/")
    }
    loaded = {file for file in loaded if not file.startswith(".venv") and file.endswith(".py")}
    assert "harness/training/step.py" in loaded
    assert loaded - AROUND <= set(FILES)


def files_of_user(folder: Path, files: dict[str, str], root: str = "net.py") -> set[str]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {name.removeprefix("user/") for name in code_files(str(folder / root)) if name.startswith("user/")}


def test_neighbours_of_the_users_network_count(tmp_path):
    """Also inside packages, and under names that this project's files have too."""
    files = {
        "net.py": "from layers import WIDTH\nimport pack.model\n",
        "layers.py": "WIDTH = 8\n",
        "pack/__init__.py": "from .blocks import Block\n",
        "pack/blocks.py": "Block = 1\n",
        "pack/model.py": "from pack.deep import layers\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import unused\nelse:\n    import used\n",
        "pack/deep/__init__.py": "",
        "pack/deep/layers.py": "from .. import other\n",
        "pack/other.py": "",
        "used.py": "",
    }
    assert files_of_user(tmp_path, files | {"unused.py": ""}) == set(files)
    for name in files:
        before = code_digest(str(tmp_path / "net.py"))
        (tmp_path / name).write_text("# a comment\n" + files[name])
        assert code_digest(str(tmp_path / "net.py")) == before, name
        (tmp_path / name).write_text(files[name] + "ANOTHER = 1\n")
        assert code_digest(str(tmp_path / "net.py")) != before, name
    assert files_of_user(tmp_path, {"final.py": "from architectures import final\n"}, "final.py") == {"final.py"}


def test_neighbours_that_appear_vanish_or_cannot_be_parsed(tmp_path):
    net = {"net.py": "try:\n    import old, gone\nexcept Exception:\n    pass\n"}
    assert files_of_user(tmp_path, net) == {"net.py"}
    assert files_of_user(tmp_path, net | {"old.py": "print 'Python 2'\n", "gone.py": ""}) == {*net, "old.py", "gone.py"}
    (tmp_path / "gone.py").unlink()
    assert files_of_user(tmp_path, {}) == {*net, "old.py"}
    for source in ("\ufeffWIDTH = 8\n".encode(), "# coding: latin-1\nNAME = 'é'\n".encode("latin-1"), b"\xff"):
        (tmp_path / "old.py").write_bytes(source)
        assert files_of_user(tmp_path, {}) == {*net, "old.py"}


def test_a_file_in_the_checkout_has_neighbours_too():
    """By path: outside this project's packages it is the user's."""
    with tempfile.TemporaryDirectory(dir=TOP, prefix=".test-") as folder:
        assert files_of_user(Path(folder), {"net.py": "import layers\n", "layers.py": ""}) == {"net.py", "layers.py"}


def test_the_classes_of_a_given_network_count(tmp_path):
    import torch
    import torchvision

    (tmp_path / "layers_of_net.py").write_text("import torch\nclass Layer(torch.nn.Module):\n    pass\n")
    (tmp_path / "net.py").write_text("from layers_of_net import Layer\nbuild = lambda num_classes: Layer()\n")
    layer = plugins.load("architectures", str(tmp_path / "net.py"), "build")(10)
    network = torch.nn.Sequential(layer, torchvision.models.resnet18())
    own = {name for name in code_files("", network) if name.startswith("user/")}
    assert own == {"user/layers_of_net.py", "user/resnet.py"}
    before = code_digest("", network)
    (tmp_path / "layers_of_net.py").write_text((tmp_path / "layers_of_net.py").read_text() + "A = 1\n")
    assert code_digest("", network) != before


def test_help_texts_do_not_count():
    source = b'epochs: int = Field(10, description="at most")'
    assert meaning_digest(source.replace(b"at most", b"no more"), ".py") == meaning_digest(source, ".py")
    assert meaning_digest(source.replace(b"10", b"11"), ".py") != meaning_digest(source, ".py")


def test_the_version_is_in_no_module_that_counts():
    """A release that changes no training leaves runs continuable."""
    assert [name for name in FILES if version("classifier-harness") in (TOP / name).read_text()] == []
