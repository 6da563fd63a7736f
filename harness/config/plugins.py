"""Folders as plugin registries: the file name is the name on the command line; the path of a FILE.py works as well.

`names` only lists file names, so that `--help` stays fast; `load` imports. Files that begin with `_` are private.
"""

import ast
import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.config import BadInput

TOP = Path(__file__).resolve().parent.parent.parent  # the folder of this project's packages
PACKAGES = ("architectures", "benchmarks", "export", "harness", "tune_spaces")

KEYS = {
    "tune_spaces": "space",
    "architectures": "trial.architecture",
    "harness.data.datasets": "data.name",
    "export.runtimes": "benchmark.runtimes",
}


def names(package: str) -> list[str]:
    """The plugins in a package's folder, sorted."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, package
    folder = Path(next(iter(spec.submodule_search_locations)))
    return sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith(("_", "test_")))


def source(package: str, name: str) -> Path:
    """The file of a plugin given by name or path. Raises BadInput where it is unknown, with the known names."""
    subject = f"{KEYS[package]}={name}"
    if name.endswith(".py"):
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            raise BadInput(
                f"{subject}: no such file; give the path of a .py file or one of {', '.join(names(package))}"
            )
        return path
    known = names(package)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise BadInput(f"{subject}: unknown; {hint}choose one of {', '.join(known)}, or the path of a FILE.py")
    spec = importlib.util.find_spec(f"{package}.{name}")
    assert spec is not None and spec.origin, name
    return Path(spec.origin)


def load(package: str, name: str, attribute: str, *default: Any) -> Any:
    """`attribute` of a plugin given by name or path, else `default`.

    Raises BadInput where the plugin is unknown or fails to import, or lacks the attribute and no default is given.
    """
    path = source(package, name)
    subject = f"{KEYS[package]}={name}"
    try:
        module = _from_path(path) if name.endswith(".py") else importlib.import_module(f"{package}.{name}")
    except Exception as error:
        raise BadInput(f"{subject}: cannot be loaded: {type(error).__name__}: {error}; fix {path}") from error
    if not default and not hasattr(module, attribute):
        raise BadInput(
            f"{subject}: {path} has no `{attribute}`; see a file of {package.replace('.', '/')}/ for the form"
        )
    return getattr(module, attribute, *default)


def _from_path(path: Path) -> ModuleType:
    return _executed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _executed(path: Path, _changed: int) -> ModuleType:
    """A user's file as a module, executed again only when the file changes."""
    _check_neighbours(path)
    name = "user_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up there
    neighbours = Neighbours(path.parent)
    try:
        with neighbours:
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    for attribute, value in list(vars(module).items()):
        if inspect.isfunction(value) and neighbours.is_here(Path(value.__code__.co_filename)):
            # The function may import a neighbour when it is called.
            setattr(module, attribute, neighbours.around(value))
    return module


class Neighbours:
    """The modules beside a user's file. While code of that file runs, imports find them first; afterwards they are
    removed from sys.modules, so that files in different folders may each have a neighbour of the same name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.own: dict[str, ModuleType] = {}
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        self.hidden = {name: sys.modules[name] for name in self.own if name in sys.modules}
        sys.modules.update(self.own)
        sys.path.insert(0, str(self.folder))

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth:
            return
        sys.path.remove(str(self.folder))
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and not name.startswith("user_") and self.is_here(Path(file)):
                self.own[name] = sys.modules.pop(name)
        sys.modules.update(self.hidden)

    def is_here(self, file: Path) -> bool:
        """Whether `file` lies beside the user's file and is neither this project's nor an installed package's."""
        inside = file.is_relative_to(self.folder) and "site-packages" not in file.parts
        return inside and not any(file.is_relative_to(TOP / package) for package in PACKAGES)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            with self:
                return function(*arguments, **named)

        return called


def _check_neighbours(path: Path) -> None:
    """Raises BadInput where a user's file imports a name that both a neighbour and a package of this project have."""
    if path.is_relative_to(TOP):
        return
    for name in PACKAGES:
        for neighbour in (path.parent / name, path.parent / f"{name}.py"):
            if neighbour.exists() and name in _imported(path):
                raise BadInput(
                    f"{path}: imports {name}, which is this project's package and also its neighbour {neighbour}; "
                    "rename the neighbour"
                )


def _imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports."""
    names: set[str] = set()
    with contextlib.suppress(SyntaxError):  # loading the file reports it
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names
