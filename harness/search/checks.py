"""Checks made before a run starts or writes anything."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harness.config import BadInput, Trial, Tune
from harness.config.keys import flatten
from harness.run.records import DataRecord, RunRecord
from harness.run.storage import Json
from harness.search.resolution import Resolved
from harness.search.trials import TrialGenerator

if TYPE_CHECKING:
    from harness.data.splits import Dataset
    from harness.run.directory import RunDirectory
    from harness.run.progress import Progress


@dataclass(frozen=True)
class Notes:
    """What the checks of data and networks found that is no error, in sentences."""

    data: list[str]
    network: list[str]

    @property
    def lines(self) -> list[str]:
        return [*(f"data: {note}" for note in self.data), *(f"network: {note}" for note in self.network)]


def check_all(resolved: Resolved, run: "RunDirectory", data: "Dataset") -> tuple[TrialGenerator, Notes]:
    """Check everything that needs the decoded images. Raises BadInput where a check fails."""
    from harness.search.data_check import data_notes

    recorded = run.configuration()
    if recorded and recorded.data.fingerprint != data.fingerprint:
        raise BadInput(
            f"run={run.path}: was trained on other images ({recorded.data.fingerprint}, now {data.fingerprint}); "
            "give run=NEW or restore the data"
        )
    generator = TrialGenerator(resolved, data.fingerprint)
    check_trials(generator, run)
    if not generator.asks_optuna:
        generator.search_trials()  # raises BadInput for equal variants and impossible grids
    network = check_networks(resolved, generator, data)
    return generator, Notes(data_notes(data, _lossy_drop(resolved.config)), network)


def _lossy_drop(config: Tune) -> float | None:
    """The accuracy that a lossy file may lose; None where this command exports none."""
    lossy = any(name in ("onnx_int8", "onnx_fp16") for name in config.export.formats)
    return config.export.max_accuracy_drop if lossy and "export" in config.stages else None


def check_code(run: "RunDirectory", architectures: set[str], accepted: bool, progress: "Progress") -> None:
    """Record the code of these architectures. Raises BadInput (warns if `accepted`) where trials used other code."""
    from harness.run.provenance import code_digest, code_files

    for architecture in sorted(architectures):
        now = code_files(architecture)
        digest = code_digest(architecture)
        done = [r for r in run.trials() if r.config["architecture"] == architecture and r.is_done]
        other = [r.id for r in done if r.environment.code != digest]
        if other:
            before = (recorded.code if (recorded := run.configuration()) else {}).get(architecture, {})
            changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            if not all((r.environment.code or "").startswith("v2:") for r in done if r.id in other):
                changed = ["the way in which code is compared (docs/provenance.md)"]
            what = f"{_some(changed) or 'code'} changed since trials {_some(other)} were trained"
            if not accepted:
                raise BadInput(
                    f"run={run.path}: {what}; give run=NEW, or other_code=true to mix trials of both in this run"
                )
            progress.line(f"warning: {what}; their results may not be comparable")
        run.record_code(architecture, now)


def _some(names: list[str]) -> str:
    """The first six names, and the number of the rest."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def check_before_start(resolved: Resolved, run: "RunDirectory", recorded: RunRecord | None) -> None:
    """Check what needs no decoded data and no started process. Raises BadInput where a check fails."""
    from harness.config import plugins
    from harness.data.dataset import dataset_identity
    from harness.run import storage
    from harness.run.cache import cache_folder
    from harness.run.directory import LOCK, OWNER

    config = resolved.config
    # A folder that holds only trials (archived or shared results) is accepted: a run can continue from them.
    ours = (LOCK, OWNER, "trials", "trials.csv")
    is_ours = run.path.is_dir() and all(entry.name in ours for entry in run.path.iterdir())
    is_ours = is_ours and ((run.path / "trials").is_dir() or not (run.path / "trials.csv").exists())
    if run.path.exists() and recorded is None and not is_ours:
        raise BadInput(f"run={run.path}: exists and is not a run directory; give another path")
    if recorded and (differing := _differing(recorded.identity, resolved.identity)):
        raise BadInput(f"run={run.path}: was begun with {differing}; give the same, or run=NEW")
    before = recorded.weights if recorded else {}
    if changed := [file for file, digest in resolved.weights.items() if before.get(file, digest) != digest]:
        raise BadInput(f"run={run.path}: {changed[0]} changed since its trials started from it; give run=NEW")
    storage.check_writable(run.path, "run")
    storage.check_writable(cache_folder("datasets"), "HARNESS_CACHE")
    for name in config.benchmark.runtimes or []:
        plugins.source("export.runtimes", name)
    plugins.source("harness.data.datasets", config.data.name)
    asha = config.search.scheduler == "asha"
    if asha and config.search.asha.grace_epochs >= config.trial.epochs > 1:
        raise BadInput(
            f"search.asha.grace_epochs={config.search.asha.grace_epochs}: must be less than "
            f"trial.epochs={config.trial.epochs}; give a smaller one or search.scheduler=fifo"
        )
    if config.search.scheduler != "fifo" and resolved.space.variants:
        raise BadInput(
            f"search.scheduler={config.search.scheduler}: would stop seeds of a variant by how good they are, and so "
            "falsify its mean; use fifo for an ablation"
        )
    _check_machine(config)
    dataset_identity(config.data)


def _check_machine(config: Tune) -> None:
    """Raises BadInput where this machine has not what is asked for."""
    from harness.run import gpus, system

    if "://" in (config.resources.address or ""):
        raise BadInput(
            f"resources.address={config.resources.address}: Ray Client is not supported; start the command on a node "
            "of the cluster, with resources.address=auto or HOST:PORT"
        )
    wanted = config.resources.gpus_per_trial or 0
    if wanted and not config.resources.address and gpus.usable() < wanted:
        raise BadInput(
            f"resources.gpus_per_trial={wanted:g}: PyTorch sees {gpus.usable()} GPUs here; ask for less, leave it "
            "out, or give resources.address of a cluster that has them"
        )
    if "benchmark" in config.stages and config.benchmark.device == "cuda" and gpus.usable() == 0:
        raise BadInput("benchmark.device=cuda: PyTorch sees no GPU on this machine; use auto or cpu")
    if "benchmark" in config.stages and "device" in config.benchmark.scopes and gpus.usable() == 0:
        raise BadInput(f"benchmark.scope={config.benchmark.scope}: PyTorch sees no GPU on this machine; use host")
    cores = system.environment().cores
    if (config.resources.cpus_per_trial or 0) > cores and not config.resources.address:
        raise BadInput(
            f"resources.cpus_per_trial={config.resources.cpus_per_trial:g}: this machine has {cores}; ask for less"
        )


def _differing(before: Json, now: Json) -> str:
    """What a run was begun with, where it differs; empty if nothing does. Where images are does not count: their
    fingerprint does."""

    def of(identity: Json) -> Json:
        found = flatten({"space": identity.get("space"), "data": {**identity.get("data", {}), "root": None}})
        return found | {f"trial.{key}": value for key, value in identity.get("pinned", {}).items()}

    first, second = of(before), of(now)
    changed = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    return ", ".join(f"{key}={first[key]}" if key in first else f"no {key}" for key in changed[:4])


def check_trials(planner: "TrialGenerator", run: "RunDirectory") -> None:
    """Raises BadInput where the run holds trials of other images, or of variants that were changed since."""
    from harness.run.provenance import trial_id

    variants = planner.resolved.space.variants
    for record in run.trials():
        if trial_id(record.config, record.seed, planner.fingerprint) != record.id:
            raise BadInput(
                f"run={run.path}: trial {record.id} is of other images or another version of this project, or was "
                "edited: its id does not follow from its configuration; give run=NEW or restore the data"
            )
        name = record.variant
        if not variants and planner.trial(record.stage, record.parameters, seed=record.seed).id != record.id:
            raise BadInput(
                f"run={run.path}: trial {record.id} was not trained with the parameters that it names; give run=NEW"
            )
        if name in variants and planner.trial("search", variants[name], seed=record.seed).id != record.id:
            raise BadInput(
                f"run={run.path}: variant {name} or the base was changed since trial {record.id} was trained; give "
                "run=NEW, or the variant another name"
            )


def some_trials(resolved: Resolved, planner: "TrialGenerator") -> "list[Trial]":
    """The configuration of each variant; of a search, those of five samples as representatives."""
    changes = [resolved.space.variants[name] for name in resolved.variants] or [planner.sample(i) for i in range(5)]
    return [planner.trial("check", change).config for change in changes]


def check_networks(resolved: Resolved, planner: "TrialGenerator", data: "Dataset") -> list[str]:
    """Check each network on a few images; returns what is different about its training, in words.

    Raises BadInput for an option that does not fit, a network that cannot be trained, or too large a batch.
    """
    from harness.data.batches import pick_device
    from harness.training.execution import ExecutionPlan
    from harness.training.network_check import check_network

    local = not resolved.config.resources.address
    notes: dict[str, list[str]] = {}
    for trial in some_trials(resolved, planner):
        if trial.batch_size > len(data.train):
            raise BadInput(
                f"trial.batch_size={trial.batch_size}: more than the {len(data.train)} training images; give less"
            )
        if trial.schedule.warmup_epochs >= trial.epochs:
            raise BadInput(
                f"trial.schedule.warmup_epochs={trial.schedule.warmup_epochs:g}: the learning rate would never reach "
                f"trial.optimizer.lr in trial.epochs={trial.epochs}; give less"
            )
        if local:
            ExecutionPlan.of(trial, pick_device(resolved.config.resources.device))
        decides = {"architecture", "options", "precision", "memory_format", "epochs", "batch_size"}
        key = trial.model_dump_json(include=decides)
        if key in notes:
            continue
        try:
            notes[key] = check_network(trial, data)
        except BadInput as error:
            others = "; search.variants=[...] trains others without it" if len(resolved.variants) > 1 else ""
            raise BadInput(f"{error}{others}") from error
        notes[key] = [f"{trial.architecture} {note}" for note in notes[key]]
    return list(dict.fromkeys(itertools.chain(*notes.values())))


def run_record(
    resolved: Resolved, data: "Dataset", notes: Notes, trained: set[str], recorded: RunRecord | None
) -> RunRecord:
    """run.json without command lines and environment. `trained`: variants that have trials; `recorded`: the run.json
    before this command."""
    space = resolved.space
    by_class = {
        name: np.bincount(split.labels[split.rows], minlength=len(data.classes)).tolist()
        for name, split in (("test", data.test), ("validation", data.validation))
    }
    variants = [name for name in space.variants if name in trained or name in resolved.variants]
    return RunRecord(
        config=resolved.config.model_dump(mode="json"),
        identity=resolved.identity,
        weights=(recorded.weights if recorded else {}) | resolved.weights,
        pinned=dict(resolved.pinned),
        parameters={key: str(domain) for key, domain in resolved.space.parameters.items()},
        variants={name: dict(space.variants[name]) for name in variants},
        claims=[vars(claim) for claim in resolved.claims_of(variants)],
        published={name: space.published[name] for name in variants if name in space.published},
        network_notes=notes.network,
        data=DataRecord(
            classes=list(data.classes),
            fingerprint=data.fingerprint,
            input_size=data.input_size,
            train=len(data.train),
            validation=len(data.validation),
            test=len(data.test),
            test_by_class=by_class["test"],
            validation_by_class=by_class["validation"],
            notes=notes.data,
        ),
    )
