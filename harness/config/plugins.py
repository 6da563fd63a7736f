"""Folders as plugin registries: the file name is the name on the command line; the path of a FILE.py works as well.

`names` only lists file names, so that `--help` stays fast; `load` imports. Files that begin with `_` are private.
"""

import ast
import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
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
    own = name.endswith(".py")
    try:
        module = _executed(path, path.stat().st_mtime_ns) if own else importlib.import_module(f"{package}.{name}")
    except (Exception, SystemExit) as error:
        raise BadInput(f"{subject}: cannot be loaded: {type(error).__name__}: {error}; fix {path}") from error
    if not default and not hasattr(module, attribute):
        raise BadInput(
            f"{subject}: {path} has no `{attribute}`; see a file of {package.replace('.', '/')}/ for the form"
        )
    value = getattr(module, attribute, *default)
    # A function of the user's may import a neighbour when it is called.
    return _neighbours(path.parent).around(value) if own and callable(value) else value


@functools.lru_cache(maxsize=64)
def _executed(path: Path, _changed: int) -> ModuleType:
    """A user's file as a module, executed again only when the file changes."""
    _check_neighbours(path)
    name = "user_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up there
    try:
        with _neighbours(path.parent).found_first():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class Neighbours:
    """The modules beside a user's file.

    While `found_first`, imports find them before modules of the same name from elsewhere, which are restored at the
    end: files in different folders may each have a neighbour of one name. Afterwards the folder is the last of
    sys.path, where it hides nothing, and neighbours whose names collide with none stay in sys.modules: methods may
    import them later, and pickle finds their classes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.own: dict[str, ModuleType] = {}  # those whose names collide
        self._elsewhere: dict[str, bool] = {}
        for package in PACKAGES:  # once imported, no neighbour can take their place
            importlib.import_module(package)

    @contextlib.contextmanager
    def found_first(self) -> Iterator[None]:
        colliding = self._colliding()
        hidden = _taken_out(colliding)
        sys.modules.update(self.own)
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):  # the user's code may change sys.path too
                sys.path.remove(str(self.folder))
            if str(self.folder) not in sys.path:
                sys.path.append(str(self.folder))
            self.own |= _taken_out(colliding)
            sys.modules.update(hidden)

    def _colliding(self) -> set[str]:
        """Top-level names of modules from elsewhere, imported or only installed, that a module here has too."""
        found = set()
        for path in self.folder.iterdir():
            name = path.name.removesuffix(".py")
            if name in sys.stdlib_module_names or name in PACKAGES or not name.isidentifier():
                continue
            module = sys.modules.get(name)
            file, places = getattr(module, "__file__", None), list(getattr(module, "__path__", []))
            is_here = any(Path(place).resolve() == path.resolve() for place in [*filter(None, [file]), *places[:1]])
            # A folder without __init__.py, a namespace package, gives way to any other module.
            is_module = path.suffix == ".py" or (path / "__init__.py").is_file() or (path.is_dir() and not file)
            elsewhere = self._installed(name) if module is None or is_here else not is_here
            if is_module and elsewhere:
                found.add(name)
        return found

    def _installed(self, name: str) -> bool:
        """Whether a module of that name would be imported from elsewhere, say by a library later on."""
        if name not in self._elsewhere:
            places = [place for place in sys.path if place != str(self.folder)]
            spec = importlib.machinery.PathFinder.find_spec(name, places)
            self._elsewhere[name] = spec is not None and spec.origin is not None
        return self._elsewhere[name]

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def called(*arguments: Any, **named: Any) -> Any:
            with self.found_first():
                return function(*arguments, **named)

        return called


_neighbours = functools.cache(Neighbours)


def _taken_out(tops: set[str]) -> dict[str, ModuleType]:
    """Remove the modules of these top-level names from sys.modules; returns them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in tops}


def _check_neighbours(path: Path) -> None:
    """Raises BadInput where a user's file imports a name that both a neighbour and a package of this project have."""
    if path.parent == TOP:
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
