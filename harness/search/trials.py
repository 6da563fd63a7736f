"""The trials of a run: their ids, seeds, configurations, and whether each may read the test split."""

import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import BadInput, Trial
from harness.config.keys import build_config, merge, nested
from harness.run.provenance import trial_id
from harness.run.records import TrialRecord
from harness.search.resolution import Resolved
from harness.stats.sequential import SEEDS
from tune_spaces import Choice, Integer

MOST_TRIALS = 100_000  # of a grid
CONFIRM_SEEDS_FROM = 1_000_000  # search seeds stay below: confirmation never repeats a draw of the search


@dataclass(frozen=True)
class TrialSpec:
    """One trial of a run: its id, origin, seed and configuration; `parameters` are its changes to the base."""

    id: str
    stage: str
    variant: str
    index: int
    seed: int
    config: Trial
    parameters: Mapping[str, Any]
    read_test: bool

    def labels(self) -> dict[str, Any]:
        """The fields of trial.json that identify the trial."""
        names = ("id", "stage", "variant", "index")
        return {name: getattr(self, name) for name in names} | {"parameters": dict(self.parameters)}


def _with_absolute_paths(trial: Trial) -> Trial:
    """The trial with absolute paths to its files, which every node can open."""
    options = dict(trial.options)
    weights = options.get("weights")
    if isinstance(weights, str) and Path(weights).is_file():
        options["weights"] = str(Path(weights).absolute())
    architecture = trial.architecture
    if architecture.endswith(".py"):
        architecture = str(Path(architecture).expanduser().absolute())
    return trial.model_copy(update={"architecture": architecture, "options": options})


class TrialGenerator:
    """Makes the trials of a run: the only place that decides ids, seeds and access to the test split."""

    def __init__(self, resolved: Resolved, fingerprint: str):
        self.resolved, self.fingerprint = resolved, fingerprint
        self.search = resolved.config.search
        self._search_trials: list[TrialSpec] | None = None

    @property
    def asks_optuna(self) -> bool:
        """Whether Optuna suggests the samples, so that they are not known beforehand."""
        return self.search.algorithm == "optuna" and bool(self.resolved.space.parameters)

    def trial(
        self,
        stage: str,
        changes: Mapping[str, Any],
        *,
        variant: str = "",
        index: int = 0,
        seed: int | None = None,
        read_test: bool = False,
    ) -> TrialSpec:
        """The trial of the base with `changes` (by dotted key); default seed: that of the search plus `index`.

        Raises BadInput where a key or value is invalid.
        """
        base = self.resolved.base
        if changes.get("architecture", base["architecture"]) != base["architecture"]:
            pinned = self.resolved.pinned  # other options belong to the other architecture
            base["options"] = {k.removeprefix("options."): v for k, v in pinned.items() if k.startswith("options.")}
        config = build_config(Trial, merge(base, nested(dict(changes))), f"{variant or 'sample'}: ")
        config = _with_absolute_paths(config)
        seed = self.search.seed + index if seed is None else seed
        identity = trial_id(config.model_dump(mode="json"), seed, self.fingerprint)
        return TrialSpec(identity, stage, variant, index, seed, config, dict(changes), read_test)

    def search_trials(self) -> list[TrialSpec]:
        """The trials of the search stage: variants (with seeds=auto those of the first look), or samples by grid or
        random draw (not those by Optuna).

        Raises BadInput where two variants are the same configuration, or a grid is not possible.
        """
        if self._search_trials is None:
            self._search_trials = self._make_search_trials()
        return self._search_trials

    def _make_search_trials(self) -> list[TrialSpec]:
        space, search = self.resolved.space, self.search
        if space.variants:
            found = self.repeats(SEEDS[0] if search.seeds == "auto" else search.seeds, self.resolved.variants)
            by_id: dict[str, str] = {}
            for spec in found:
                other = by_id.setdefault(spec.id, spec.variant)
                if other != spec.variant:
                    raise BadInput(
                        f"space={self.resolved.config.space}: variants {other} and {spec.variant} are the same "
                        "configuration; leave one out"
                    )
            return found
        if not space.parameters:
            return [self.trial("search", {})]
        if search.algorithm == "grid":
            return [self.trial("search", changes, index=i) for i, changes in enumerate(self._grid())]
        return [self.trial("search", self.sample(i), index=i) for i in range(search.samples)]

    def repeats(self, seeds: int, variants: Iterable[str]) -> list[TrialSpec]:
        """The trials of the first `seeds` seeds of these variants, seed by seed."""
        changes = self.resolved.space.variants
        return [
            self.trial("search", changes[name], variant=name, index=i, read_test=True)
            for i in range(seeds)
            for name in variants
        ]

    def sample(self, index: int) -> dict[str, Any]:
        """Draw `index` of a random search, which depends on space, seed and index only; 0 is the base configuration."""
        if index == 0:
            return {}
        draws = {}
        for key, domain in self.resolved.space.parameters.items():
            seed = hashlib.sha256(f"{self.search.seed} {index} {key}".encode()).digest()
            draws[key] = domain.draw(random.Random(seed))
        return draws

    def _grid(self) -> Iterable[dict[str, Any]]:
        """Every combination; `samples` does not limit it."""
        parameters = self.resolved.space.parameters
        for key, domain in parameters.items():
            if not isinstance(domain, Choice | Integer):
                raise BadInput(f"search.algorithm=grid: {key} is {domain}; a grid needs Choice or Integer, or pin it")
        count = math.prod(
            len(d.values) if isinstance(d, Choice) else d.high - d.low + 1
            for d in parameters.values()
            if isinstance(d, Choice | Integer)
        )
        if count > MOST_TRIALS:
            raise BadInput(
                f"search.algorithm=grid: {count:,} combinations, more than {MOST_TRIALS:,}; pin some, or use random"
            )
        for values in itertools.product(*(d.values for d in parameters.values() if isinstance(d, Choice | Integer))):
            yield dict(zip(parameters, values, strict=True))

    def confirmations(self, candidates: Sequence[TrialRecord]) -> list[TrialSpec]:
        """Trials that repeat the candidates (records of search trials), all on the same fresh seeds."""
        return [
            self.trial(
                "confirm",
                record.parameters,
                variant=record.variant,
                index=record.index,
                seed=CONFIRM_SEEDS_FROM + i,
            )
            for i in range(self.search.confirm_seeds)
            for record in candidates
        ]
