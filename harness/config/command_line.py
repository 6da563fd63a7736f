"""`key=value` arguments -> a typed configuration -> `main`: the same grammar, help and errors for every command.

Strings and paths are taken as typed; other values are read by their field's type; lists are written `[a,b]`; `none`
clears an optional value. Bad input ends with exit code 2 and one line `error: key=value: reason; what to do`.
"""

import gc
import importlib.util
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from harness import __version__
from harness.config import BadInput, plugins, stopping
from harness.config.errors import LONGEST, NotYet, StorageError, raised_at, shown
from harness.config.keys import build_config, keys, nested, plugin_choices, read_values

FLAGS = {
    "--help": "this text",
    "--version": "the version",
    "--debug": "tracebacks of errors",
}


def split_arguments(arguments: list[str]) -> dict[str, str]:
    """Split `key=value` arguments into a mapping of texts, in order.

    Raises BadInput where an argument has another form, a key is given twice, or a value is empty.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise BadInput(f"{argument}: not of the form key=value; `--help` lists the keys")
        if key in texts:
            raise BadInput(f"{argument}: {key} is given twice; leave one out")
        if not text:
            raise BadInput(f"{argument}: the value is empty; give one, or leave the key out")
        texts[key] = text
    return texts


def _type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return "|".join(_type_name(a) for a in inner if a is not type(None))
    if origin is list:
        return f"[{_type_name(inner[0])},...]"
    if origin is tuple:
        return "[" + ",".join(_type_name(a) for a in inner) + "]"
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _type_name(inner[0])
    if inner and origin is not dict:  # Literal
        return "|".join(str(a) for a in inner)
    return {str: "text", Path: "path", float: "number", int: "integer", bool: "true|false"}.get(annotation, "")


def help_text(doc: str, model: type[BaseModel]) -> str:
    """The text of `--help`: the module's docstring, then every key with type, default and meaning."""
    lines = [doc.strip(), "", "Keys, written key=value:"]
    for key in keys(model):
        default = "required" if key.required else "default " + _show(key.default)
        if key.default in (None, {}) and not key.required:
            default = ""
        kind = _type_name(key.annotation)
        lines.append(f"  {key.name:<36} " + "; ".join(part for part in (key.description, kind, default) if part))
        if key.folder:
            lines.append(f"  {'':<36} {plugin_choices(key)}" + ("" if "." in key.folder else ", or FILE.py"))
    lines += ["", *(f"  {flag:<36} {meaning}" for flag, meaning in FLAGS.items())]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(_show(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_command(
    model: type[BaseModel],
    main: Callable[[Any], int],
    doc: str,
    resolve: Callable[[dict[str, Any]], Any] | None = None,
    prepare: Callable[[list[str]], list[str]] = list,
) -> int:
    """Parse the command line, build the configuration and call `main`; returns the exit code.

    `resolve` builds the configuration from the values by dotted key where validation alone is not enough; `prepare`
    expands the short form of a command's arguments. Exit codes: 2 for bad input, 1 for other errors, 128 + signal.
    """
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(help_text(doc, model))
        return 0
    if "--version" in arguments:
        print(f"harness {__version__}")
        return 0
    debug = "--debug" in arguments
    gc.set_threshold(50_000)  # imported objects live on: collecting during imports takes a fifth of their time
    stopping.handle()
    try:
        check_not_shadowed()
        values = read_values(split_arguments(prepare([a for a in arguments if a != "--debug"])), model)
        config = resolve(values) if resolve else build_config(model, nested(values))
        if isinstance(out := getattr(config, "out", None), Path):
            _check_out(out)
        return main(config)
    except (BadInput, NotYet) as error:
        if debug:
            traceback.print_exc()
        _print_error(str(error))
        return 2
    except ValidationError as error:
        first = error.errors()[0]
        _print_error(f"{'.'.join(map(str, first['loc']))}={first['input']}: {first['msg']}; `--help` has the types")
        return 2
    except KeyboardInterrupt as error:
        if stopping.is_stopped():
            return stopping.ended()
        return _ended_by_code(error)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        if not isinstance(error, Exception):
            return _ended_by_code(error)
        if isinstance(error, StorageError):
            _print_error(str(error))
        else:
            _print_error(f"{type(error).__name__}: {error or 'no message'}; run with --debug for a traceback")
        return 1


def _check_out(out: Path) -> None:
    """Raises BadInput where the results could not be written at the end."""
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if out.suffix and out.is_dir():
        raise BadInput(f"out={out}: is a folder; give a file")
    try:
        with tempfile.TemporaryFile(dir=out if out.is_dir() else place):
            pass
    except OSError as error:
        raise BadInput(f"out={out}: {place} cannot be written to ({error.strerror}); give another place") from error


def _ended_by_code(error: BaseException) -> int:
    """Code that the user named has raised what ends a process: the command did not do what it was asked for."""
    _print_error(
        f"{type(error).__name__}({error}){raised_at(error)}: the code ended the command; remove what raises it"
    )
    return 2


def _print_error(text: str) -> None:
    line = shown(" ".join(text.split()), LONGEST - len("error: "))
    print(f"error: {line}".encode(errors="backslashreplace").decode(), file=sys.stderr)


def check_not_shadowed() -> None:
    """Raises BadInput where a user's folder or file shadows one of this project's packages, whose names are common.

    `python -m` imports from the current folder first; some shadowed packages would only fail after the training.
    """
    for name in plugins.PACKAGES:
        spec = importlib.util.find_spec(name)
        found = [*(spec.submodule_search_locations or [])] if spec else []
        found += [spec.origin] if spec and spec.origin else []
        if not any(Path(place).resolve().is_relative_to(plugins.TOP / name) for place in found):
            where = found[0] if found else "nothing"
            raise BadInput(
                f"{name}: {where} hides this project's package; start in another folder, rename it, or use "
                "classifier-harness, which does not look into the current folder"
            )
