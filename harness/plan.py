"""From a command line and a space to the list of trials: what a run means, before anything runs."""

import dataclasses
import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import checkpoint, cli, plugins, results
from harness.config import Trial, Tune
from harness.errors import BadInput
from tune_spaces import Choice, Claim, Integer, Space

CONFIRM_SEEDS_FROM = 1_000_000  # search seeds stay below: confirmation never repeats a draw of the search


@dataclass(frozen=True)
class Planned:
    """One trial of a run: which, and why."""

    id: str
    stage: str
    variant: str
    index: int
    seed: int
    config: Trial
    parameters: Mapping[str, Any]
    read_test: bool

    def labels(self) -> dict[str, Any]:
        """What trial.json says beside configuration and metrics."""
        names = ("id", "stage", "variant", "index")
        return {name: getattr(self, name) for name in names} | {"parameters": dict(self.parameters)}


@dataclass(frozen=True)
class Resolved:
    """A command line understood: the configuration, the space without what is pinned, and the pinned values."""

    config: Tune
    space: Space
    pinned: Mapping[str, Any]

    @property
    def run(self) -> Path:
        """The run directory: as given, or runs/<space>-<digest of space, pinned values and data>."""
        if self.config.run is not None:
            return self.config.run
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        return Path("runs").absolute() / f"{Path(self.config.space).stem}-{digest}"

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this run this one: asking for more samples, seeds, variants or stages does not change it."""
        name = self.config.space
        space = str(Path(name).expanduser().absolute()) if name.endswith(".py") else name
        data = self.config.data.model_dump(mode="json")
        if data["classes"] is None:
            del data["classes"]
        return {"space": space, "pinned": dict(self.pinned), "data": data}

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of each file of weights that a trial may start from, by its path."""
        key = "options.weights"
        values = [self.config.trial.options.get("weights"), *(c.get(key) for c in self.space.variants.values())]
        domain = self.space.parameters.get(key)
        values += domain.values if isinstance(domain, Choice) else []
        files = {Path(value).absolute() for value in values if isinstance(value, str)}
        return {str(file): checkpoint.sha256(file) for file in sorted(files) if file.is_file()}

    @property
    def base(self) -> dict[str, Any]:
        return self.config.trial.model_dump(mode="json")

    @property
    def variants(self) -> list[str]:
        return self.config.search.variants or list(self.space.variants)

    def claims_of(self, variants: Sequence[str]) -> list[Claim]:
        """Those of the space about these variants; where it makes none, that each is better than the first."""
        if self.space.claims:
            return [c for c in self.space.claims if {c.variant, c.than} <= set(variants)]
        return [Claim(f"{name} is better than {variants[0]}", name, variants[0]) for name in variants[1:]]


def resolve(values: Mapping[str, Any]) -> Resolved:
    """Defaults, then the space's values, then those of the command line, which pin what they set."""
    if "space" not in values:
        raise BadInput(f"space=: which space? give space=NAME, one of {', '.join(plugins.names('tune_spaces'))}")
    space = plugins.load_space(values["space"])
    if values.get("trial.architecture", space.trial.get("architecture")) != space.trial.get("architecture"):
        space = _without_options(space)
    where = f"space={values['space']}: "
    prefixed = {f"trial.{k}": v for k, v in space.trial.items()}
    prefixed |= {f"data.{k}": v for k, v in space.data.items()} | {f"search.{k}": v for k, v in space.search.items()}
    defaults = {"space": values["space"], **cli.nested(prefixed)}
    cli.build(Tune, defaults, where)  # what is wrong in the file is told apart from what is wrong in the command
    given = dict(values)
    address = os.environ.get("RAY_ADDRESS")
    if address and "resources.address" not in given:
        given["resources.address"] = address
    config = cli.build(Tune, cli.merge(defaults, cli.nested(given)))
    own = results.flatten(config.trial.model_dump(mode="json", exclude={"options"}), keep_lists=True)
    own |= {f"options.{name}": value for name, value in config.trial.options.items()}
    pinned = {key: own[key] for key in sorted(k.removeprefix("trial.") for k in given if k.startswith("trial."))}
    return Resolved(config, _without(space, pinned, config), pinned)


def _with_absolute_paths(trial: Trial) -> Trial:
    """Files that a trial names, as every node finds them."""
    options = dict(trial.options)
    weights = options.get("weights")
    if isinstance(weights, str) and Path(weights).is_file():
        options["weights"] = str(Path(weights).absolute())
    architecture = trial.architecture
    if architecture.endswith(".py"):
        architecture = str(Path(architecture).expanduser().absolute())
    return trial.model_copy(update={"architecture": architecture, "options": options})


def _without_options(space: Space) -> Space:
    """Options are those of an architecture: whoever chooses another leaves the space's behind."""
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


class Planner:
    """Makes the trials of a run; one place decides ids, seeds and what each trial may read."""

    def __init__(self, resolved: Resolved, fingerprint: str):
        self.resolved, self.fingerprint = resolved, fingerprint
        self.search = resolved.config.search

    def trial(
        self,
        stage: str,
        changes: Mapping[str, Any],
        *,
        variant: str = "",
        index: int = 0,
        seed: int | None = None,
        read_test: bool = False,
    ) -> Planned:
        """The base with `changes` (dotted keys) as a trial; sample `index` has a seed of its own."""
        base = self.resolved.base
        if changes.get("architecture", base["architecture"]) != base["architecture"]:
            pinned = self.resolved.pinned  # the others are the other architecture's
            base["options"] = {k.removeprefix("options."): v for k, v in pinned.items() if k.startswith("options.")}
        config = cli.build(Trial, cli.merge(base, cli.nested(dict(changes))), f"{variant or 'sample'}: ")
        config = _with_absolute_paths(config)
        seed = self.search.seed + index if seed is None else seed
        identity = results.trial_id(config.model_dump(mode="json"), seed, self.fingerprint)
        return Planned(identity, stage, variant, index, seed, config, dict(changes), read_test)

    def search_trials(self) -> list[Planned]:
        """The trials of the first stage that are known beforehand: variants, or samples by grid or random draw."""
        space, search = self.resolved.space, self.search
        if space.variants:
            found = [
                self.trial("search", space.variants[name], variant=name, index=i, read_test=True)
                for i in range(search.seeds)
                for name in self.resolved.variants
            ]
            by_id: dict[str, str] = {}
            for planned in found:
                other = by_id.setdefault(planned.id, planned.variant)
                if other != planned.variant:
                    raise BadInput(
                        f"space={self.resolved.config.space}: variants {other} and {planned.variant} are the same "
                        "configuration; leave one out"
                    )
            return found
        if not space.parameters:
            return [self.trial("search", {})]
        if search.algorithm == "grid":
            return [self.trial("search", changes, index=i) for i, changes in enumerate(self._grid())]
        return [self.trial("search", self.sample(i), index=i) for i in range(search.samples)]

    def sample(self, index: int) -> dict[str, Any]:
        """Draw `index` of a random search: nothing but the space, the seed and the index decides it; 0 is the base."""
        if index == 0:
            return {}
        draws = {}
        for key, domain in self.resolved.space.parameters.items():
            seed = hashlib.sha256(f"{self.search.seed} {index} {key}".encode()).digest()
            draws[key] = domain.draw(random.Random(seed))
        return draws

    def _grid(self) -> Iterable[dict[str, Any]]:
        """Every combination; `samples` does not cut it."""
        parameters = self.resolved.space.parameters
        for key, domain in parameters.items():
            if not isinstance(domain, Choice | Integer):
                raise BadInput(f"search.algorithm=grid: {key} is {domain}; a grid needs Choice or Integer, or pin it")
        for values in itertools.product(*(d.values for d in parameters.values() if isinstance(d, Choice | Integer))):
            yield dict(zip(parameters, values, strict=True))

    def confirmations(self, candidates: Sequence[Mapping[str, Any]]) -> list[Planned]:
        """The candidates (records of search trials) again, each on the same fresh seeds."""
        return [
            self.trial(
                "confirm",
                record["parameters"],
                variant=record["variant"],
                index=record["index"],
                seed=CONFIRM_SEEDS_FROM + i,
            )
            for i in range(self.search.confirm_seeds)
            for record in candidates
        ]
