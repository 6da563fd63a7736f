"""Folders as registries: the file name is the name on the command line, a path to a FILE.py works as well.

`names` only looks at file names, so that `--help` stays fast; `load` imports. Files that begin with `_` are private.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.config import BadInput

if TYPE_CHECKING:
    pass


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
    """The file of a plugin given by name or by path; BadInput lists the names and the closest one."""
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
    """`attribute` of a plugin given by name or by path; where the file does not hold it the default, else BadInput."""
    path = source(package, name)
    subject = f"{KEYS[package]}={name}"
    try:
        module = _from_path(path) if name.endswith(".py") else importlib.import_module(f"{package}.{name}")
    except Exception as error:
        raise BadInput(f"{subject}: cannot be loaded: {type(error).__name__}: {error}; mend {path}") from error
    if not default and not hasattr(module, attribute):
        raise BadInput(
            f"{subject}: {path} has no `{attribute}`; see a file of {package.replace('.', '/')}/ for the form"
        )
    return getattr(module, attribute, *default)


def _from_path(path: Path) -> ModuleType:
    return _executed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _executed(path: Path, _changed: int) -> ModuleType:
    """A user's file as a module, executed once as long as it does not change."""
    name = "user_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look there
    sys.path.insert(0, str(path.parent))  # so that the file finds its neighbours, as a script would
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
