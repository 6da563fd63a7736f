"""Resolves a command line and a space into configuration, pinned values and run directory."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.config import BadInput, Data, Trial, Tune, plugins
from harness.config.keys import build_config, flatten, merge, nested
from harness.run import storage, trust
from tune_spaces import Choice, Claim, Space


@dataclass(frozen=True)
class Resolved:
    """A resolved command line: the configuration, the space without pinned parameters, and the pinned values."""

    config: Tune
    space: Space
    pinned: Mapping[str, Any]
    given: Space | None = None  # a Space object, where no name or file was given

    @property
    def run(self) -> Path:
        """The run directory: as given, or runs/<space>-<digest of space, pinned values and data>."""
        if self.config.run is not None:
            return self.config.run
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        return Path("runs").absolute() / f"{Path(self.config.space).stem}-{digest}"

    @property
    def identity(self) -> dict[str, Any]:
        """The values that identify the run; more samples, seeds, variants or stages do not change it."""
        name = self.config.space
        space = str(Path(name).expanduser().absolute()) if name.endswith((".py", ".json")) else name
        if name.endswith(".json"):
            space += f" {storage.sha256(Path(name).expanduser())[:16]}"
        if self.given is not None:
            space = f"Space {hashlib.sha256(repr(self.given).encode()).hexdigest()[:16]}"
        data = self.config.data.model_dump(mode="json")
        if data["classes"] is None:
            del data["classes"]
        return {"space": space, "pinned": dict(self.pinned), "data": data}

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of each weights file that a trial may start from, by its absolute path."""
        key = "options.weights"
        values = [self.config.trial.options.get("weights"), *(c.get(key) for c in self.space.variants.values())]
        domain = self.space.parameters.get(key)
        values += domain.values if isinstance(domain, Choice) else []
        files = {Path(value).absolute() for value in values if isinstance(value, str)}
        return {str(file): storage.sha256(file) for file in sorted(files) if file.is_file()}

    @property
    def base(self) -> dict[str, Any]:
        return self.config.trial.model_dump(mode="json")

    @property
    def variants(self) -> list[str]:
        return self.config.search.variants or list(self.space.variants)

    def claims_of(self, variants: Sequence[str]) -> list[Claim]:
        """The space's claims about these variants; if the space has none, that each is better than the first."""
        if self.space.claims:
            return [c for c in self.space.claims if {c.variant, c.than} <= set(variants)]
        return [Claim(f"{name} is better than {variants[0]}", name, variants[0]) for name in variants[1:]]


def resolve(values: Mapping[str, Any], own_space: Space | None = None) -> Resolved:
    """Merge defaults, the space's values and the command line's `values` (by dotted key), which pin what they set.

    `own_space` replaces the space that `values` name. Raises BadInput for a missing space or an invalid key or value.
    """
    if "space" not in values:
        raise BadInput(f"space=: is missing; give space=NAME, one of {', '.join(plugins.names('tune_spaces'))}")
    space = (
        load_space(values["space"], str(values.get("trust", "")).lower() == "true") if own_space is None else own_space
    )
    if values.get("trial.architecture", space.trial.get("architecture")) != space.trial.get("architecture"):
        space = _without_options(space)
    where = f"space={values['space']}: "
    prefixed = {f"trial.{k}": v for k, v in space.trial.items()}
    prefixed |= {f"data.{k}": v for k, v in space.data.items()} | {f"search.{k}": v for k, v in space.search.items()}
    defaults = {"space": values["space"], **nested(prefixed)}
    build_config(Tune, defaults, where)  # checked alone, so that its errors name the space
    given = dict(values)
    address = os.environ.get("RAY_ADDRESS")
    if address and "resources.address" not in given:
        given["resources.address"] = address
    config = build_config(Tune, merge(defaults, nested(given)))
    _check_domains(space, config, where)
    own = flatten(config.trial.model_dump(mode="json", exclude={"options"}), keep_lists=True)
    options = config.trial.model_dump(mode="json")["options"]  # as recorded: tuples are lists
    own |= {f"options.{name}": value for name, value in options.items()}
    pinned = {key: own[key] for key in sorted(k.removeprefix("trial.") for k in given if k.startswith("trial."))}
    return Resolved(config, _without(space, pinned, config), pinned, own_space)


def _check_domains(space: Space, config: Tune, where: str) -> None:
    """Raises BadInput where a search could draw a value that its key does not take, however seldom."""
    base = config.trial.model_dump(mode="json")
    for key, domain in space.parameters.items():
        values = domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
        for value in values:
            if key == "architecture":
                plugins.source("architectures", str(value))
            try:
                Trial.model_validate(merge(base, nested({key: value})))
            except ValidationError as error:
                wrong = [one for one in error.errors() if ".".join(map(str, one["loc"])).startswith(key)]
                if wrong:  # others are of combinations
                    reason = wrong[0]["msg"][0].lower() + wrong[0]["msg"][1:]
                    raise BadInput(f"{where}parameters {key}={value}: {reason}; change it in the space") from error


def _without_options(space: Space) -> Space:
    """Options belong to an architecture: choosing another one drops the space's options."""
    trial, parameters = (
        {key: value for key, value in values.items() if not key.startswith("options.")}
        for values in (space.trial, space.parameters)
    )
    return dataclasses.replace(space, trial=trial, parameters=parameters)


def _without(space: Space, pinned: Mapping[str, Any], config: Tune) -> Space:
    if config.search.variants is not None:
        unknown = [name for name in config.search.variants if name not in space.variants]
        if unknown or not space.variants:
            names = ", ".join(space.variants) or "none, it is a search"
            raise BadInput(f"search.variants=[{','.join(config.search.variants)}]: the space's variants are: {names}")
    for key in pinned:
        asked = config.search.variants or space.variants
        changing = [name for name, changes in space.variants.items() if key in changes and name in asked]
        if changing:
            raise BadInput(
                f"trial.{key}={pinned[key]}: the variants {', '.join(changing)} change it; "
                "leave it out, leave them out by search.variants=[...], or write a space of your own"
            )
    parameters = {key: domain for key, domain in space.parameters.items() if key not in pinned}
    return dataclasses.replace(space, parameters=parameters)


def load_space(name: str, trusted: bool = False) -> Space:
    """The SPACE of a named space or a FILE.py, or the configuration in a run's winner.json as a space of its own.

    Raises BadInput where it is missing or not a Space, or winner.json names code that is not `trusted`.
    """
    if name.endswith(".json"):
        return _winner_space(Path(name).expanduser(), trusted)
    space = plugins.load("tune_spaces", name, "SPACE")
    if not isinstance(space, Space):
        raise BadInput(f"space={name}: SPACE is a {type(space).__name__}; make it a tune_spaces.Space")
    return space


def _winner_space(path: Path, trusted: bool) -> Space:
    try:
        found = storage.read_json(path)
        trial, data = Trial.model_validate(found["trial"]), Data.model_validate(found["data"])
    except (OSError, storage.Corrupt, KeyError, TypeError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"is no winner.json of a run ({error})"
        hint = "give one that harness.tune has written; trial.KEY=VALUE changes its values, a space FILE.py has others"
        raise BadInput(f"space={path}: {reason}; {hint}") from error
    names = [name for name in (trial.architecture, data.name) if name.endswith(".py")]
    weights = trial.options.get("weights")
    names += [weights] if isinstance(weights, str) else []
    trust.check_names(names, path.name, trusted, f"space={path}")
    values = trial.model_dump(mode="json")
    options = {f"options.{key}": value for key, value in values.pop("options").items()}
    return Space(trial=flatten(values, keep_lists=True) | options, data=flatten(data.model_dump(mode="json")))


def code_files_of(resolved: Resolved) -> list[str]:
    """Absolute paths of the files that the command line and its space name: code, and weights to start from."""
    key, config = "architecture", resolved.config
    names = [config.trial.architecture, *(changes.get(key) for changes in resolved.space.variants.values())]
    domain = resolved.space.parameters.get(key)
    names += domain.values if isinstance(domain, Choice) else []
    names += [config.data.name, config.space, *(config.benchmark.runtimes or [])]
    files = {Path(str(name)).expanduser().absolute() for name in names if str(name).endswith(".py")}
    return [*(str(path) for path in sorted(files) if path.is_file()), *resolved.weights]
