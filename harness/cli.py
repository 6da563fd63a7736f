"""`key=value` arguments -> a typed configuration -> `main`: the same grammar, help and errors for every command.

Strings and paths are taken as typed; other values are read by their field's type; lists are written `[a,b]`; `none`
empties what may be empty. Bad input ends with exit code 2 and one line `error: key=value: reason; what to do`.
"""

import difflib
import gc
import json
import math
import re
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from harness import __version__, plugins
from harness.errors import BadInput

M = TypeVar("M", bound=BaseModel)

FLAGS = {
    "--help": "this text",
    "--version": "the version",
    "--debug": "tracebacks of errors",
}


@dataclass(frozen=True)
class Key:
    """A key of the command line: dotted name, its type, default and meaning."""

    name: str
    annotation: Any
    default: Any
    description: str
    folder: str | None
    required: bool


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key that a configuration takes, nested ones with dots."""
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from keys(annotation, f"{prefix}{name}.")
            continue
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        folder = str(extra["folder"]) if "folder" in extra else None
        yield Key(prefix + name, annotation, default, info.description or "", folder, info.is_required())


def split(arguments: list[str]) -> dict[str, str]:
    """`key=value` arguments as a mapping of texts, in their order."""
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


def read(texts: dict[str, str], model: type[BaseModel]) -> dict[str, Any]:
    """Texts as values by dotted key, each read by its field's type. BadInput names an unknown key's nearest."""
    known = {key.name: key for key in keys(model)}
    values: dict[str, Any] = {}
    for name, text in texts.items():
        parent, _, option = name.rpartition(".")
        if name in known:
            values[name] = _read_text(text, known[name].annotation)
        elif option and parent in known and get_origin(known[parent].annotation) is dict:
            values[name] = _read_text(text, Any)
        else:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "`--help` lists the keys"
            raise BadInput(f"{name}={text}: unknown key; {hint}")
    return values


def _read_text(text: str, annotation: Any) -> Any:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if type(None) in inner and text.lower() in ("none", "null"):
            return None
        return _read_text(text, next(a for a in inner if a is not type(None)))
    if origin in (list, tuple):
        if not (text.startswith("[") and text.endswith("]")):
            return text  # pydantic says that it is no list
        return _read_items(text, inner[0])
    if annotation is Any:
        try:
            return json.loads(text.lower() if text.lower() in ("true", "false") else text)
        except ValueError:  # [conv1,bn1] as elsewhere, without JSON's quotes
            return _read_items(text, Any) if re.fullmatch(r"\[[^\[\]]*\]", text) else text
    return text


def _read_items(text: str, annotation: Any) -> list[Any]:
    return [_read_text(item.strip(), annotation) for item in text[1:-1].split(",") if item.strip()]


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key as nested mappings."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `change` put in; neither is touched."""
    merged = dict(base)
    for name, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def build(model: type[M], tree: dict[str, Any], where: str = "") -> M:
    """The configuration of nested values. BadInput names the first key that is wrong; `where` is put before it."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason[0].lower() + reason[1:]
        if first["type"] == "missing":
            raise BadInput(f"{where}{name}=: {name} is missing; give {name}=VALUE") from error
        subject = f"{name}={first['input']}" if not isinstance(first["input"], dict) else name
        known = next((key for key in keys(model) if key.name == name), None)
        hint = f"; {_choices(known)}" if known and known.folder else "; `--help` has types and ranges"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BadInput(f"{where}{subject}: {reason}{hint}{more}") from error


def _choices(key: Key) -> str:
    assert key.folder is not None
    return "one of " + ", ".join(plugins.names(key.folder))


def _type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _type_name(next(a for a in inner if a is not type(None)))
    if origin is list:
        return f"[{_type_name(inner[0])},...]"
    if origin is tuple:
        return "[" + ",".join(_type_name(a) for a in inner) + "]"
    if origin is not None and hasattr(annotation, "__metadata__"):
        return _type_name(inner[0])
    if inner and origin is not dict:  # Literal
        return "|".join(str(a) for a in inner)
    return {str: "text", Path: "path", float: "number", int: "whole number", bool: "true|false"}.get(annotation, "")


def help_text(doc: str, model: type[BaseModel]) -> str:
    """What `--help` prints: the module's docstring, then every key with type, default and meaning."""
    lines = [doc.strip(), "", "Keys, written key=value:"]
    for key in keys(model):
        default = "required" if key.required else "default " + _show(key.default)
        if key.default in (None, {}) and not key.required:
            default = ""
        kind = _type_name(key.annotation)
        lines.append(f"  {key.name:<31}" + "; ".join(part for part in (key.description, kind, default) if part))
        if key.folder:
            lines.append(f"  {'':<31}{_choices(key)}" + ("" if "." in key.folder else ", or FILE.py"))
    lines += ["", *(f"  {flag:<31}{meaning}" for flag, meaning in FLAGS.items())]
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(_show(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def run(
    model: type[BaseModel],
    main: Callable[[Any], int],
    doc: str,
    resolve: Callable[[dict[str, Any]], Any] | None = None,
    prepare: Callable[[list[str]], list[str]] = list,
) -> int:
    """Parse the command line, build the configuration and call `main`; returns the exit code.

    `resolve` turns the values by dotted key into the configuration, where that takes more than checking them;
    `prepare` rewrites the arguments of a command with a shorter form.
    """
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(help_text(doc, model))
        return 0
    if "--version" in arguments:
        print(f"harness {__version__}")
        return 0
    debug = "--debug" in arguments
    gc.set_threshold(50_000)  # imports make objects that last: collecting in between takes a fifth of their time
    for number in STOPPING:
        signal.signal(number, _stop)
    try:
        values = read(split(prepare([a for a in arguments if a != "--debug"])), model)
        return main(resolve(values) if resolve else build(model, nested(values)))
    except BadInput as error:
        if debug:
            traceback.print_exc()
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        for number in STOPPING:  # the interpreter's end would put the system's handlers back
            signal.signal(number, signal.SIG_IGN)
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + (_received or signal.SIGINT)
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split()) or "no message"
        print(f"error: {type(error).__name__}: {reason}; --debug shows where", file=sys.stderr)
        return 1


STOPPING = (signal.SIGINT, signal.SIGTERM)
ENDING_SECONDS = 15.0  # for the end that a signal began; another one meanwhile changes nothing
_received: int | None = None
_received_at = -math.inf


def _stop(number, _frame):
    """Both as KeyboardInterrupt: a SystemExit that meets Ray at work becomes one trial's error there."""
    global _received, _received_at
    if time.monotonic() - _received_at < ENDING_SECONDS:
        return
    _received, _received_at = number, time.monotonic()
    raise KeyboardInterrupt


def check_stopped() -> None:
    """Raise KeyboardInterrupt where a signal to stop has come: once raised, it may be lost in a callback of C's."""
    if _received is not None:
        raise KeyboardInterrupt
