"""Runs the stages of a run in order: search, confirm, export, benchmark, report; with functions for use from Python.

from harness import open_run, tune
run = tune("quick", run="runs/first", search={"samples": 2})
run.trials, run.winner, run.files
"""

import contextlib
import difflib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import STAGES, BadInput, Benchmark, Export, Strict, Tune
from harness.config.command_line import check_not_shadowed
from harness.config.keys import flatten
from harness.search.checks import (
    Notes,
    check_all,
    check_before_start,
    check_code,
    run_record,
    some_trials,
)
from harness.search.resolution import Resolved, code_files_of, resolve
from harness.search.trials import TrialGenerator

if TYPE_CHECKING:
    from harness.data.splits import Dataset
    from harness.reporting.opened import OpenRun
    from harness.run.directory import RunDirectory
    from harness.run.progress import Progress
    from tune_spaces import Space

Section = Mapping[str, Any] | Strict  # the keys of a section: trial={"epochs": 3}, or a Trial


def tune(
    space: "str | Path | Space", *, run: Path | str | None = None, stages: list[str] | None = None, **sections: Section
) -> "OpenRun":
    """Run the missing stages, as `python -m harness.tune` does; returns the run.

    `space`: a name, a FILE.py or a Space. `sections`: trial, data, search, resources, export, benchmark, with the keys
    of the command line. Raises BadInput for bad input, RuntimeError where a trial or a stage failed.
    """
    from harness.reporting.opened import open_run
    from tune_spaces import Space as SpaceType

    given = space if isinstance(space, SpaceType) else None
    values: dict[str, Any] = {"space": "notebook" if given else str(space)}  # open: values by dotted key
    values |= {name: value for name, value in (("run", run), ("stages", stages)) if value is not None}
    check_not_shadowed()
    for name, section in sections.items():
        _check_section(name, section)
        own = section.model_dump(exclude_unset=True) if isinstance(section, Strict) else section
        options = own.get("options", {})  # values of any form, mappings too
        values |= flatten({**own, "options": {}}, f"{name}.", keep_lists=True)
        values |= {f"{name}.options.{key}": value for key, value in options.items()}
    resolved = resolve(values, given)
    if run_stages(
        resolved, " ".join(["harness.tune from Python:", *(f"{key}={value}" for key, value in values.items())])
    ):
        raise RuntimeError(f"a trial or a stage failed; see {resolved.run / 'run.log'}")
    return open_run(resolved.run)


def _check_section(name: str, section: object) -> None:
    """Raises BadInput where an argument of `tune` is no section of the configuration."""
    types: dict[str, Any] = {one: info.annotation for one, info in Tune.model_fields.items()}
    known = [one for one, kind in types.items() if isinstance(kind, type) and issubclass(kind, Strict)]
    if name not in known:
        close = difflib.get_close_matches(name, [*known, "run", "stages"], n=1)
        hint = f"did you mean {close[0]}?" if close else f"give run, stages, {', '.join(known)}"
        raise BadInput(f"{name}: unknown; {hint}")
    if not isinstance(section, Mapping | Strict):
        raise BadInput(f"{name}: give a mapping of its keys, not a {type(section).__name__}")


def export(run: Path | str, *, trust: bool = False, **settings: Any) -> dict[str, Path]:
    """Export the winner, as `python -m export` does; `settings`: the keys of `export.`; returns its files by name.

    Raises BadInput where `run` is not a run directory or is in use, RuntimeError where nothing has finished or parity
    fails.
    """
    from export.exporter import export_winner
    from harness.reporting.opened import open_run

    opened = open_run(run)
    with _working_on(opened.directory, trust) as progress:
        export_winner(opened.directory, Export.model_validate(settings), progress)
    return opened.files


def benchmark(run: Path | str, *, trust: bool = False, **settings: Any) -> "OpenRun":
    """Benchmark the export, as `python -m benchmarks` does; `settings`: the keys of `benchmark.`; returns the run.

    Raises BadInput where `run` is not a run directory, is in use, or the settings cannot be measured here, RuntimeError
    where nothing is exported.
    """
    from benchmarks.inference.runner import benchmark_exported
    from harness.reporting.opened import open_run

    opened = open_run(run)
    with _working_on(opened.directory, trust) as progress:
        benchmark_exported(opened.directory, Benchmark.model_validate(settings), progress)
    return opened


@contextlib.contextmanager
def _working_on(run: "RunDirectory", trust: bool) -> "Iterator[Progress]":
    from harness.run.progress import Progress
    from harness.run.trust import check_run

    check_not_shadowed()
    check_run(run, trust)
    progress = Progress(run.path / "run.log")
    with run.locked(), progress.live():
        yield progress
    progress.check_logged()


def run_stages(resolved: Resolved, command: str) -> int:
    """Check everything, then run the stages; returns the exit code. `command` is recorded in run.json.

    Raises BadInput where a check fails.
    """
    from harness.data.dataset import load_dataset
    from harness.run import trust
    from harness.run.directory import RunDirectory
    from harness.run.progress import Progress

    config, progress = resolved.config, Progress()
    run = RunDirectory(resolved.run)
    recorded = run.configuration()
    check_before_start(resolved, run, recorded)
    with progress.live():
        data = load_dataset(config.data, progress.counter("decoding images"))
    named = code_files_of(resolved)
    for line in trust.check_run(run, config.trust, named):
        progress.line(line)
    with progress.live():
        progress.status("checking data and networks")
        generator, notes = check_all(resolved, run, data)
    if config.dry_run:
        for line in notes.lines:
            progress.line(line)
        from harness.search.estimate import print_estimate

        print_estimate(resolved, generator, data, progress)
        return 0
    failed: list[str] = []
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if config.resources.address and {"search", "confirm"} & set(config.stages):
            from harness.search.allocation import Allocation
            from harness.search.cluster import cluster

            nodes = stack.enter_context(cluster(config.resources))  # a wrong address fails before any file is written
            Allocation.of(config.resources, nodes, 1)
        stack.enter_context(run.locked())
        _begin(generator, data, notes, run, command, progress)
        for path in named:
            trust.remember(Path(path))
        for stage in (stage for stage in STAGES if stage in config.stages):
            try:
                with progress.live():
                    run_stage(stage, generator, run, progress)
                    if stage in ("search", "confirm"):
                        _write_winner(run, config.search.metric)
            except BadInput:
                raise
            except Exception as error:
                failed.append(stage)
                progress.failure(f"stage {stage} failed", error)
                if "--debug" in sys.argv:
                    raise
    code = report_outcome(run, config, failed, time.monotonic() - started, progress)
    if code == 0:
        progress.check_logged()
    return code


def _begin(
    generator: TrialGenerator,
    data: "Dataset",
    notes: Notes,
    run: "RunDirectory",
    command: str,
    progress: "Progress",
) -> None:
    """Write run.json and remove corrupt trial records. Raises BadInput where trials were trained with other code."""
    from harness.run import gpus

    resolved = generator.resolved
    config = resolved.config
    record = run_record(resolved, data, notes, {record.variant for record in run.trials()}, run.configuration())
    run.create(record, command)
    progress.log = run.path / "run.log"
    progress.line(f"run {run.path}")
    if reason := gpus.unusable():
        progress.line(f"warning: {reason}; everything runs on the CPU")
    for line in notes.lines:
        progress.line(line)
    run.print_notices(progress.line)
    run.set_aside_corrupt()
    run.write_trials_csv()
    if {"search", "confirm"} & set(config.stages):
        networks = {trial.architecture for trial in some_trials(resolved, generator)}
        check_code(run, networks, config.other_code, progress)


def _write_winner(run: "RunDirectory", metric: str) -> None:
    from harness.stats.ranking import rank, winning_trial

    if ranked := rank(run.trials(), metric):
        run.write_winner(winning_trial(ranked[0], metric))


def run_stage(stage: str, generator: TrialGenerator, run: "RunDirectory", progress: "Progress") -> None:
    """Run one stage: read the results of earlier stages in the run directory and add those that are missing."""
    config = generator.resolved.config
    if stage in ("search", "confirm"):
        from harness.search.stages import confirm_stage, search_stage

        if stage == "search":
            search_stage(generator, run, progress)
        else:
            confirm_stage(generator, run, progress)
    elif stage == "export":
        from export.exporter import export_winner

        export_winner(run, config.export, progress)
    elif stage == "benchmark":
        from benchmarks.inference.runner import benchmark_exported

        benchmark_exported(run, config.benchmark, progress)
    else:
        from harness.reporting.page import write_report

        write_report(run, progress)


def report_outcome(run: "RunDirectory", config: Tune, failed: list[str], seconds: float, progress: "Progress") -> int:
    """Log how the command ended; returns the exit code."""
    from harness.reporting.results import Results
    from harness.run.progress import duration

    records = run.trials()
    broken = [r for r in records if r.status in ("failed", "oom")]
    for record in broken:
        progress.line(f"{record.status}: trial {record.id}: {record.error} ({run.trial_folder(record.id)})")
    for line in Results.of(run).headline.lines:
        progress.line(line)
    progress.line(f"done in {duration(seconds)}" + (f"; failed stages: {', '.join(failed)}" if failed else ""))
    if "report" in config.stages and "report" not in failed:
        progress.line(f"report {run.path / 'report' / 'index.html'}")
    return 1 if broken or failed else 0
