"""Dotted keys: lists the keys of a configuration, parses text by a key's type, nests and flattens values."""

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from harness.config import BadInput, plugins

M = TypeVar("M", bound=BaseModel)


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


def read_values(texts: dict[str, str], model: type[BaseModel]) -> dict[str, Any]:
    """Parse texts by dotted key, each by its field's type. Raises BadInput for unknown keys, with the closest one."""
    known = {key.name: key for key in keys(model)}
    values: dict[str, Any] = {}
    for name, text in texts.items():
        parent, _, option = name.rpartition(".")
        if name in known and get_origin(known[name].annotation) is dict and not isinstance(_read_text(text, Any), dict):
            raise BadInput(f"{name}={text}: holds several values; give each as {name}.NAME=VALUE")
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
            return text  # pydantic reports that it is no list
        return _read_items(text, inner[0])
    if annotation is Any:
        try:
            return json.loads(text.lower() if text.lower() in ("true", "false") else text)
        except RecursionError as error:
            raise BadInput(f"{text[:40]}...: is nested too deeply; give a simpler list") from error
        except ValueError:  # [conv1,bn1], a list without JSON's quotes, as for other keys
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
            if not isinstance(branch, dict):
                raise BadInput(f"{name}: {parent} is given as a whole too; leave one out")
        if isinstance(branch.get(last), dict) and branch[last]:
            raise BadInput(f"{name}: its parts are given too; leave one out")
        branch[last] = value
    return tree


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with the leaves of `change` put in; neither argument is modified."""
    merged = dict(base)
    for name, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def build_config(model: type[M], tree: dict[str, Any], where: str = "") -> M:
    """Build a configuration from nested values. Raises BadInput for the first invalid key, prefixed with `where`."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = _location(first["loc"], model)
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason[0].lower() + reason[1:]
        if first["type"] == "missing":
            raise BadInput(f"{where}{name}=: {name} is missing; give {name}=VALUE") from error
        if first["type"] == "too_short":
            reason = f"has {len(first['input'])} values; give at least {first['ctx']['min_length']}"
        elif first["type"] == "list_type" and isinstance(first["input"], str):
            reason = f"give a list: {name}=[{first['input']}]"
        elif first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, [key.name for key in keys(model)], n=1)
            reason = "unknown key" + (f"; did you mean {close[0]}?" if close else "")
        subject = f"{name}={first['input']}" if not isinstance(first["input"], dict) else name
        known = next((key for key in keys(model) if key.name == name), None)
        choices = re.findall(r"'([^']*)'", first["msg"]) if first["type"] == "literal_error" else []
        if close := difflib.get_close_matches(str(first["input"]), choices, n=1):
            reason += f"; did you mean {close[0]}?"
        hint = f"; {plugin_choices(known)}" if known and known.folder else "; `--help` has types and ranges"
        others = len({_location(one["loc"], model) for one in error.errors()}) - 1
        more = f" (and {others} more)" if others else ""
        raise BadInput(f"{where}{subject}: {reason}{hint}{more}") from error


def _location(parts: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The dotted key of an error, without pydantic's name of a member of a union behind it."""
    known = {key.name for key in keys(model)}
    names = [".".join(map(str, parts[:n])) for n in range(len(parts) + 1)]
    key = next((n for n, name in enumerate(names) if name in known), len(parts))
    return names[key] if key < len(parts) and isinstance(parts[key], str) else names[-1]


def plugin_choices(key: Key) -> str:
    assert key.folder is not None
    return "one of " + ", ".join(plugins.names(key.folder))


def flatten(values: Mapping[str, Any], prefix: str = "", *, keep_lists: bool = False) -> dict[str, Any]:
    """Flatten nested mappings, names joined with dots; lists become JSON text unless `keep_lists`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.", keep_lists=keep_lists)
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list | tuple) and not keep_lists else value
    return flat
