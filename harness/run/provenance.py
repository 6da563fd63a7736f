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

TOP = Path(__file__).parent.parent.parent
ROOT = "harness/training/loop.py"  # what a trial runs
LOADED_BY_NAME = ("harness/data/datasets/*.py", "harness/cpu_kernels/*.cpp")  # no import statement names these


def trial_id(config: Mapping[str, Any], seed: int, fingerprint: str) -> str:
    """Derived from all that the result depends on: configuration, seed and data."""
    decides = {name: value for name, value in config.items() if name not in ("checkpoint_seconds", "cache_features")}
    text = json.dumps([decides, seed, fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_digest(architecture: str, network: object = None) -> str:
    """Of all code that decides what a trial of that architecture (a name or FILE.py) computes; or one of a `network`
    that was given instead, whose class's file counts."""
    return "v2:" + hashlib.sha256(json.dumps(code_files(architecture, network)).encode()).hexdigest()[:16]


def code_files(architecture: str, network: object = None) -> dict[str, str]:
    """Digest of each of these files, by its path; files of the user by their name."""
    own = Path(architecture) if architecture.endswith(".py") else TOP / "architectures" / f"{architecture}.py"
    if network is not None:
        with contextlib.suppress(OSError, TypeError):  # a class that was typed into a notebook has no file
            own = Path(inspect.getfile(type(network)))
    files = {str(path.relative_to(TOP)): path for path in _modules_of_training()}
    for path in _with_imports([own]) if own.is_file() else []:
        is_ours = path.is_relative_to(TOP) and path != own
        files[str(path.relative_to(TOP)) if is_ours else f"architectures/{path.name}"] = path
    return {name: _digest_of_file(path, path.stat().st_mtime_ns) for name, path in sorted(files.items())}


@cache
def _modules_of_training() -> list[Path]:
    loaded = [path for pattern in LOADED_BY_NAME for path in sorted(TOP.glob(pattern))]
    return _with_imports([TOP / ROOT, *loaded])


def _with_imports(paths: list[Path]) -> list[Path]:
    """These files and all of this project, or beside them, that they import."""
    found: dict[Path, None] = {}
    pending = list(paths)
    while pending:
        path = pending.pop()
        if path not in found:
            found[path] = None
            if path.suffix == ".py":
                pending += _imports(path, path.stat().st_mtime_ns)
    return list(found)


@cache
def _imports(path: Path, _changed: int) -> list[Path]:
    """Files that a module imports: packages on the way to a module are executed too."""
    names = list(_imported_names(ast.parse(path.read_bytes())))
    files: list[Path] = []
    for folder in dict.fromkeys([path.parent, TOP] if not path.is_relative_to(TOP) else [TOP]):
        for name in names:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                place = folder.joinpath(*parts[:depth])
                files += [file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]
    return files


def _imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names of modules, and of what is taken from them, which may be modules; those for type checkers aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        else:
            yield from _imported_names(node)


@cache
def _digest_of_file(path: Path, _changed: int) -> str:
    return meaning_digest(path.read_text(), path.suffix)


def meaning_digest(source: str, suffix: str) -> str:
    """Of Python (`.py`) or C++ source: equal for two that differ in comments, docstrings or formatting alone."""
    meaning = repr(_meaning(ast.parse(source))) if suffix == ".py" else _without_comments(source)
    return hashlib.sha256(meaning.encode()).hexdigest()[:16]


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
