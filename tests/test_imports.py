"""Who may import whom, and that start-up stays light."""

import ast
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
ALLOWED = {
    "architectures": {"architectures"},
    "tune_spaces": {"tune_spaces"},
    "harness": {"harness", "architectures", "tune_spaces"},
    "export": {"export", "harness", "architectures", "tune_spaces"},
    "benchmarks": {"benchmarks", "export", "harness", "architectures", "tune_spaces"},
}
FORWARD = {"harness/tune.py"}  # strings the stages together
COMMANDS = {"architectures/__main__.py", "tune_spaces/__main__.py"}  # may use harness.cli
FILES = sorted(str(path.relative_to(TOP)) for package in ALLOWED for path in (TOP / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("file", FILES)
def test_import_direction(file):
    package = file.split("/")[0]
    allowed = set(ALLOWED) if file in FORWARD else ALLOWED[package] | ({"harness"} if file in COMMANDS else set())
    wrong = {
        name for name in imported(TOP / file) if name.split(".")[0] in ALLOWED and name.split(".")[0] not in allowed
    }
    assert not wrong


def test_who_imports_ray():
    """What runs the trials, and the benchmarks of what others do with Ray, and of a cluster whose nodes are killed."""
    found = [f for f in FILES if any(name.split(".")[0] == "ray" for name in imported(TOP / f))]
    others = ["benchmarks/arms/ray_tutorial.py", "benchmarks/kills.py"]
    assert found == [*others, "harness/cluster.py", "harness/search.py", "harness/worker.py"]


def test_report_imports_no_torch():
    for file in (
        "harness/report.py",
        "harness/figures.py",
        "harness/pictures.py",
        "harness/stats.py",
        "harness/results.py",
    ):
        assert not any(name.split(".")[0] == "torch" for name in imported(TOP / file))


def test_modules_have_docstrings():
    assert [f for f in FILES if not ast.get_docstring(ast.parse((TOP / f).read_text()))] == []
