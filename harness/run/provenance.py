"""What a result depends on: the trial's id, and the digest of the code that trained it.

The digest of code follows its meaning. It is made of the syntax tree of every module that the training loop imports,
directly or through others, without comments, docstrings, formatting and the help texts of configuration fields; and of
the C++ sources without comments. Digests recorded before version 0.2 have no `v2:` in front: they were made of the
bytes of a list of files (docs/provenance.md).
"""

import ast
import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from harness.config import plugins
from harness.config.plugins import TOP

ROOT = "harness/training/loop.py"  # what a trial runs
LOADED_BY_NAME = ("harness/data/datasets/*.py", "harness/cpu_kernels/*.cpp")  # no import statement names these


def trial_id(config: Mapping[str, Any], seed: int, fingerprint: str) -> str:
    """Derived from all that the result depends on: configuration, seed and data."""
    decides = {name: value for name, value in config.items() if name not in ("checkpoint_seconds", "cache_features")}
    text = json.dumps([decides, seed, fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_digest(architecture: str, network: object = None) -> str:
    """Of all code that decides what a trial of that architecture (a name or FILE.py) computes; or one of a `network`
    that was given instead, of whose classes the files count."""
    return "v2:" + hashlib.sha256(json.dumps(code_files(architecture, network)).encode()).hexdigest()[:16]


def code_files(architecture: str, network: object = None) -> dict[str, str]:
    """Digest of each of these files, by its path; files of the user are below `user/`."""
    files = {_name(path, TOP): path for path in _modules_of_training()}
    for roots, folder in _of_network(network) if network is not None else [_of_architecture(architecture)]:
        files |= {_name(path, folder): path for path in _with_imports(roots, folder)}
    return {name: _digest_of_file(path, path.stat().st_mtime_ns) for name, path in sorted(files.items())}


def network_files(architecture: str) -> dict[str, str]:
    """Those of `code_files` that are the user's: of this project's own networks the answers are compared alone."""
    return {name: digest for name, digest in code_files(architecture).items() if name.startswith("user/")}


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the files that differ, are new or are gone."""
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


Roots = tuple[list[Path], Path]  # files, and the folder in which their imports are found


def _of_architecture(architecture: str) -> Roots:
    if architecture.endswith(".py"):
        path = Path(architecture).expanduser().absolute()
        return [path], path.parent
    return _found(TOP, f"architectures.{architecture}"), TOP


def _of_network(network: Any) -> Iterator[Roots]:
    """The files of the classes of a network and its layers. Those of installed packages count without their imports."""
    for kind in {type(layer): None for layer in network.modules()}:
        with contextlib.suppress(OSError, TypeError):  # a class that was typed into a notebook has no file
            path = Path(inspect.getfile(kind)).absolute()
            depth = kind.__module__.count(".") + (path.name == "__init__.py")
            if not {"site-packages", "dist-packages"} & set(path.parts):
                yield _found(path.parents[depth], kind.__module__) or [path], path.parents[depth]
            elif not kind.__module__.startswith("torch."):  # its version is recorded
                yield [path], path


def _name(path: Path, folder: Path) -> str:
    if _is_ours(path):
        return str(path.relative_to(TOP))
    return f"user/{path.relative_to(folder) if path != folder else path.name}"


def _is_ours(path: Path) -> bool:
    return any(path.is_relative_to(TOP / package) for package in plugins.PACKAGES)


@cache
def _modules_of_training() -> list[Path]:
    loaded = [path for pattern in LOADED_BY_NAME for path in sorted(TOP.glob(pattern))]
    return _with_imports([TOP / ROOT, *loaded], TOP)


def _with_imports(roots: list[Path], folder: Path) -> list[Path]:
    """These files and all of this project, or below `folder`, that they import."""
    found: dict[Path, None] = {}
    pending = list(roots)
    while pending:
        path = pending.pop()
        if path in found or not path.is_file():
            continue
        found[path] = None
        for level, name in _imported_names(path, path.stat().st_mtime_ns) if path.suffix == ".py" else ():
            if level:
                pending += _found(path.parents[level - 1], name)
            elif name.split(".")[0] in plugins.PACKAGES:
                pending += _found(TOP, name)
            elif folder not in (TOP, path):
                pending += _found(folder, name)
        pending = [one for one in pending if _is_ours(one) or one.is_relative_to(folder)]
    return list(found)


def _found(folder: Path, name: str) -> list[Path]:
    """The files that importing a dotted name executes: packages on the way to a module too."""
    files: list[Path] = []
    place = folder
    for part in name.split("."):
        files += [file for file in (place / f"{part}.py", place / part / "__init__.py") if file.is_file()]
        place /= part
    return files


@cache
def _imported_names(path: Path, _changed: int) -> list[tuple[int, str]]:
    """(number of leading dots, dotted name of a module or of what is taken from one) of each import."""
    with contextlib.suppress(SyntaxError, ValueError):  # importing the file fails too
        return list(_imports(ast.parse(path.read_bytes())))
    return []


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, ".".join(filter(None, [node.module, alias.name]))) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _imports(ast.Module(node.orelse, []))
        else:
            yield from _imports(node)


@cache
def _digest_of_file(path: Path, _changed: int) -> str:
    return meaning_digest(path.read_bytes(), path.suffix)


def meaning_digest(source: bytes, suffix: str) -> str:
    """Of Python (`.py`) or C++ source: equal for two that differ in comments, docstrings or formatting alone."""
    meaning = source
    with contextlib.suppress(SyntaxError, ValueError):  # no Python, or not UTF-8
        text = repr(_meaning(ast.parse(source))) if suffix == ".py" else _without_comments(source.decode())
        meaning = text.encode()
    return hashlib.sha256(meaning).hexdigest()[:16]


def _meaning(node: Any) -> Any:
    """The syntax tree as nested tuples, without positions and empty fields."""
    if isinstance(node, list):
        return tuple(map(_meaning, node))
    if not isinstance(node, ast.AST):
        return node
    fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    if isinstance(node, ast.Call):
        fields["keywords"] = [one for one in node.keywords if one.arg != "description"]
    return (type(node).__name__, *((name, _meaning(value)) for name, value in fields.items()))


def _without_comments(source: str) -> str:
    kept = re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', lambda match: match[1] or " ", source, flags=re.DOTALL)
    return " ".join(kept.split())
