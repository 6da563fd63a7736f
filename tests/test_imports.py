"""Who may import whom, that names mean one thing, and that modules stay small."""

import ast
from collections import Counter

import pytest
from conftest import TOP

# Each layer may import itself and those above it; a command may import everything, and nothing imports a command.
LAYERS = (
    ("tune_spaces", "architectures"),
    ("harness.config",),
    ("harness.run",),
    ("harness.data",),
    ("harness.cpu_kernels",),
    ("harness.training",),
    ("harness.stats",),
    ("harness.search", "harness.reporting", "export"),
    ("benchmarks.inference", "benchmarks.arms", "benchmarks.simulation", "benchmarks.sweeps", "benchmarks.timing"),
    ("harness.pipeline", "COMMAND"),
)
PACKAGES = ("architectures", "benchmarks", "export", "harness", "tune_spaces")
FILES = {
    ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((TOP / package).rglob("*.py"))
    if "results" not in path.parts
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names, of what is taken from a module too: it may be a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_command(name: str) -> bool:
    """A command runs as `python -m`, and begins with what runs it; the package's own facade counts as one."""
    return name == "harness" or "__main__" in FILES[name].read_text() or name.split(".")[-1].startswith("test_")


def layer(name: str) -> int:
    if name in FILES and is_command(name):
        return len(LAYERS) - 1
    return next(i for i, names in enumerate(LAYERS) if any(f"{name}.".startswith(f"{one}.") for one in names))


@pytest.mark.parametrize("name", FILES)
def test_import_direction(name):
    ours = {one for one in imported(TREES[name]) if one.split(".")[0] in PACKAGES}
    modules = {one if one in FILES else one.rpartition(".")[0] for one in ours} - {"harness", "benchmarks"}
    assert {one: layer(one) for one in modules if layer(one) > layer(name)} == {}
    assert {one for one in modules if is_command(one)} == set()


def test_who_imports_ray():
    """What runs the trials; and the benchmarks of what others do with Ray, and of a cluster whose nodes are killed."""
    found = {name for name, tree in TREES.items() if any(one.split(".")[0] == "ray" for one in imported(tree))}
    own = {"cluster", "probe", "ray_internals", "runner", "searchers", "watcher", "worker"}
    assert found == {"benchmarks.arms.ray_tutorial", "benchmarks.sweeps", *(f"harness.search.{one}" for one in own)}


def test_report_imports_no_torch():
    light = ("harness.config", "harness.run", "harness.stats", "harness.reporting")
    for name, tree in TREES.items():
        at_start = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        if name.startswith(light) and name != "harness.reporting.inspection":
            assert not any(one.split(".")[0] == "torch" for one in imported(ast.Module(at_start, []))), name


def test_modules_have_docstrings():
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


# A plugin's functions, and the main of a command.
PRESCRIBED = {"main", "build", "load", "decode", "identity", "FORMAT", "SPACE"}


def test_a_name_means_one_thing():
    """No two public classes or functions of one name in different modules."""
    defined = Counter(
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith(("_", "test_"))
    )
    assert {name: count for name, count in defined.items() if count > 1 and name not in PRESCRIBED} == {}


def test_modules_and_functions_are_short():
    """At most 300 lines a module, 60 a function: but for the training loop, which is read from top to bottom."""
    paths = [*FILES.values(), *(TOP / "tests").rglob("*.py")]
    assert [str(path) for path in paths if len(path.read_text().splitlines()) > 300] == []
    long = {
        node.name
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    }
    assert long == {"_train"}


def test_the_package_is_small_enough_to_look_at():
    """At most ten entries beside the commands and __init__.py."""
    commands = {"__init__.py", "__main__.py", "tune.py", "report.py", "inspect.py", "__pycache__"}
    assert len({path.name for path in (TOP / "harness").iterdir()} - commands) <= 10


def test_open_dictionaries_are_few():
    """dict[str, Any] where data is really open: each line says why, or stands in a function of a few lines."""
    lines = [
        f"{path}:{number}"
        for path in FILES.values()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "dict[str, Any]" in line
    ]
    assert len(lines) <= 25, lines
