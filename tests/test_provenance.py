"""The digest of code follows its meaning: over every module that a trial's training imports, by mutation."""

import ast
import json
import re

import pytest
from conftest import TOP, command

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
    assert meaning_digest(reworded(source, suffix), suffix) == meaning_digest(source, suffix)
    changed = mutated(source, suffix)
    if changed is None:
        assert name.endswith("__init__.py")  # a docstring and imports
    else:
        assert meaning_digest(changed, suffix) != meaning_digest(source, suffix)


TRAIN = """
import json, sys
from harness import Data, Trial, train
train(Trial(architecture="final", epochs=1, options={"widths": [[4, 8]], "hidden": [8]}), Data(name="digits", limit=20))
files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
print(json.dumps(files))
"""
# Of the command that trains, not of training: they draw nothing and compute nothing of a trial.
AROUND = {"harness/training/api.py"}


def test_every_module_that_training_imports_counts(tmp_path):
    done = command("-c", TRAIN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = {
        file.removeprefix(f"{TOP}/") for file in json.loads(done.stdout.splitlines()[-1]) if file.startswith(f"{TOP}/")
    }
    loaded = {file for file in loaded if not file.startswith(".venv") and file.endswith(".py")}
    assert "harness/training/step.py" in loaded
    assert loaded - AROUND <= set(FILES)


def test_a_neighbour_of_the_users_network_counts(tmp_path):
    (tmp_path / "layers.py").write_text("WIDTH = 8\n")
    (tmp_path / "net.py").write_text("from layers import WIDTH\n\n\ndef build(num_classes):\n    return WIDTH\n")
    before = code_digest(str(tmp_path / "net.py"))
    assert {"architectures/net.py", "architectures/layers.py"} <= set(code_files(str(tmp_path / "net.py")))
    (tmp_path / "layers.py").write_text("# eight\nWIDTH = 8  # filters\n")
    assert code_digest(str(tmp_path / "net.py")) == before
    (tmp_path / "layers.py").write_text("WIDTH = 9\n")
    assert code_digest(str(tmp_path / "net.py")) != before


def test_help_texts_do_not_count():
    source = 'epochs: int = Field(10, description="at most")'
    assert meaning_digest(source.replace("at most", "no more"), ".py") == meaning_digest(source, ".py")
    assert meaning_digest(source.replace("10", "11"), ".py") != meaning_digest(source, ".py")
