"""Folders as registries: the file name is the name on the command line, a path to a FILE.py works as well.

`names` only looks at file names, so that `--help` stays fast; `load` imports. Files that begin with `_` are private.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.config import Trial
from harness.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from tune_spaces import Space


KEYS = {
    "tune_spaces": "space",
    "architectures": "trial.architecture",
    "harness.datasets": "data.name",
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


def load_space(name: str) -> "Space":
    from tune_spaces import Space

    space = load("tune_spaces", name, "SPACE")
    if not isinstance(space, Space):
        raise BadInput(f"space={name}: SPACE is a {type(space).__name__}; make it a tune_spaces.Space")
    return space


def network_options(architecture: str) -> dict[str, inspect.Parameter]:
    """The options of an architecture's `build`, by name, without the number of classes and the input size."""
    parameters = inspect.signature(load("architectures", architecture, "build")).parameters
    return {name: p for name, p in list(parameters.items())[1:] if name != "input_size"}


def build_network(trial: Trial, num_classes: int, input_size: int, *, restoring: bool = False) -> "nn.Module":
    """The network of a trial with its initial weights, from torch's global generator.

    `restoring`: weights will be loaded into it, so an option `weights` (pretrained ones) is not followed.
    Raises BadInput for an unknown option or one that the architecture refuses.
    """
    build = load("architectures", trial.architecture, "build")
    known = network_options(trial.architecture)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    options = dict(trial.options)
    for name, value in options.items():
        if name not in known and not takes_any:
            raise BadInput(
                f"trial.options.{name}={value}: {trial.architecture} has no such option; "
                f"choose from {', '.join(known) or 'none'}"
            )
    if restoring and "weights" in options:
        options["weights"] = "none"
    if "input_size" in inspect.signature(build).parameters:
        options["input_size"] = input_size
    try:
        return build(num_classes, **options)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        given = " ".join(f"trial.options.{name}={value}" for name, value in trial.options.items())
        subject = f"trial.architecture={trial.architecture} {given}".strip()
        raise BadInput(f"{subject}: {error}; `python -m architectures` lists networks and options") from error
