"""python -m harness.tune space=NAME|FILE.py [key=value ...]: trials -> confirm -> export -> benchmark -> report.

Trains the trials of a space on every device of this machine (or of a Ray cluster), confirms the best on fresh seeds,
exports the winner, checks and measures the export, and writes a report. The same command run again continues: only
what is missing runs. A value given here pins that parameter: it leaves the search.

    python -m harness.tune space=quick
    python -m harness.tune space=final data.name=images data.root=DIR search.samples=1
    python -m harness.tune space=published search.variants=[baseline,model1] search.seeds=1

Exit codes: 0 all done; 1 a trial or a stage failed; 2 bad input; 130, 143 stopped by SIGINT, SIGTERM.
"""

import contextlib
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from harness import cli, plan
from harness.config import STAGES, Trial, Tune
from harness.errors import BadInput

if TYPE_CHECKING:
    from harness.datasets import Dataset
    from harness.plan import Planned, Planner
    from harness.progress import Progress
    from harness.results import RunDirectory


def main(resolved: plan.Resolved) -> int:
    """Check everything, then run the stages; returns the exit code."""
    from harness.progress import Progress
    from harness.results import RunDirectory

    config = resolved.config
    progress = Progress()
    run = RunDirectory(resolved.run)
    recorded = run.configuration()
    check_before_start(resolved, run, recorded)

    from harness import datasets, gpus

    with progress.live():
        data = datasets.load(config.data, progress.counter("decoding images"))
    if recorded and recorded["data"]["fingerprint"] != data.fingerprint:
        raise BadInput(
            f"run={run.path}: was trained on other images ({recorded['data']['fingerprint']}, now {data.fingerprint}); "
            "give run=NEW or restore the data"
        )
    planner = plan.Planner(resolved, data.fingerprint)
    check_trials(planner, run)
    trials = None if config.search.algorithm == "optuna" and resolved.space.parameters else planner.search_trials()
    check_networks(resolved, planner, data)
    if config.dry_run:
        from harness.estimate import print_estimate

        print_estimate(resolved, planner, data, progress)
        return 0

    failed: list[str] = []
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if config.resources.address and {"search", "confirm"} & set(config.stages):
            from harness.cluster import cluster
            from harness.share import Share

            nodes = stack.enter_context(cluster(config.resources))  # a wrong address is told before anything is written
            Share.of(config.resources, nodes, 1)
        stack.enter_context(run.locked())
        run.create(
            run_json(resolved, data, {record["variant"] for record in run.trials()}, recorded),
            shlex.join(["python", "-m", "harness.tune", *sys.argv[1:]]),
        )
        progress.log = run.path / "run.log"
        progress.line(f"run {run.path}")
        if reason := gpus.unusable():
            progress.line(f"warning: {reason}; all runs on the CPU")
        run.tell_notices(progress.line)
        run.set_aside_torn()
        run.write_trials_csv()
        if {"search", "confirm"} & set(config.stages):
            networks = {trial.architecture for trial in some_trials(resolved, planner)}
            check_code(run, networks, config.other_code, progress)
        for stage in (stage for stage in STAGES if stage in config.stages):
            try:
                with progress.live():
                    run_stage(stage, resolved, planner, trials, run, progress)
            except BadInput:
                raise
            except Exception as error:
                failed.append(stage)
                progress.failure(f"stage {stage} failed", error)
                if "--debug" in sys.argv:
                    raise
    code = summary(run, config, failed, time.monotonic() - started, progress)
    if code == 0:
        progress.check_logged()
    return code


def run_stage(
    stage: str,
    resolved: plan.Resolved,
    planner: "Planner",
    trials: "list[Planned] | None",
    run: "RunDirectory",
    progress: "Progress",
) -> None:
    """One stage: it reads what earlier ones left in the run directory and adds what is missing."""
    if stage == "search":
        search(planner, trials, run, progress)
    elif stage == "confirm":
        confirm(planner, run, progress)
    elif stage == "export":
        from export.__main__ import export_winner

        export_winner(run, resolved.config.export, progress)
    elif stage == "benchmark":
        from benchmarks.inference import benchmark_exported

        benchmark_exported(run, resolved.config.benchmark, progress)
    else:
        from harness.report import write_report

        write_report(run, progress)


def search(planner: "Planner", trials: "list[Planned] | None", run: "RunDirectory", progress: "Progress") -> None:
    """Run the trials of the space that are missing."""
    from harness import results
    from harness.search import run_planned, run_suggested

    if trials is not None:
        missing = missing_of(trials, run, progress)
        if missing:
            run_planned(missing, len(trials), planner, run, progress, scheduler=True)
    else:
        wanted = range(planner.search.samples)
        done = [r for r in run.trials() if r["stage"] == "search" and (r["index"] not in wanted or results.is_done(r))]
        taken = {r["index"] for r in done}
        indices = [i for i in wanted if i not in taken]
        progress.line(f"search: {len(indices)} samples to run with Optuna, {len(taken)} done before")
        if indices:
            run.remove(lambda r: r["stage"] == "search" and r["index"] in indices)
            run_suggested(indices, planner, run, progress)
    run.write_trials_csv()


def missing_of(trials: "list[Planned]", run: "RunDirectory", progress: "Progress") -> "list[Planned]":
    """Which of these trials are to run; what is left of failed and interrupted ones goes."""
    from harness import results

    ids = {planned.id for planned in trials}
    run.remove(lambda r: r["id"] in ids and not results.is_done(r), continued=ids)
    done = {r["id"] for r in run.trials() if r["id"] in ids}
    missing = [planned for planned in trials if planned.id not in done]
    progress.line(f"{trials[0].stage}: {len(missing)} trials to run, {len(done)} done before")
    return missing


def check_code(run: "RunDirectory", architectures: set[str], accepted: bool, progress: "Progress") -> None:
    """BadInput where trials of these architectures were trained with other code than is here now, unless accepted."""
    from harness import results

    for architecture in sorted(architectures):
        now = results.code_files(architecture)
        digest = results.code_digest(architecture)
        done = [r for r in run.trials() if r["config"]["architecture"] == architecture and results.is_done(r)]
        other = [r["id"] for r in done if r["environment"].get("code") != digest]
        if other:
            before = (run.configuration() or {}).get("code", {}).get(architecture, {})
            changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
            what = f"{', '.join(changed) or 'code'} changed since trials {', '.join(other)} were trained"
            if not accepted:
                raise BadInput(f"run={run.path}: {what}; give run=NEW, or other_code=true to have both in this run")
            progress.line(f"warning: {what}; they may not compare")
        run.record("code", architecture, now)


def confirm(planner: "Planner", run: "RunDirectory", progress: "Progress") -> None:
    """Train the best of a search again on fresh seeds; then read the test set, for the winner alone."""
    from harness import stats
    from harness.evaluation import read_test
    from harness.search import run_planned

    settings = planner.search
    searched = stats.ranking([r for r in run.trials() if r["stage"] == "search"], settings.metric)
    if not searched:
        raise RuntimeError("no trial has finished: nothing to confirm")
    if planner.resolved.space.variants:
        progress.line("confirm: an ablation confirms itself by its seeds")
    elif len(searched) == 1 or settings.confirm == 0:
        progress.line("confirm: a single candidate needs none" if len(searched) == 1 else "confirm: left out")
    else:
        planned = planner.confirmations([one.records[0] for one in searched[: settings.confirm]])
        missing = missing_of(planned, run, progress)
        if missing:
            run_planned(missing, len(planned), planner, run, progress, scheduler=False)
    winner = stats.ranking(run.trials(), settings.metric)[0]
    for record in winner.records:
        if "test_accuracy" not in record["metrics"]:
            progress.status(f"reading the test set for {record['id']}")
            config = planner.resolved.config
            read_test(run.trial_folder(record["id"]), dict(record), config.data, config.resources.device)
    run.write_trials_csv()


def check_before_start(resolved: plan.Resolved, run: "RunDirectory", recorded: dict[str, Any] | None) -> None:
    """What can be told without decoding data or starting anything; BadInput otherwise."""
    from harness import datasets, gpus, plugins, results

    config = resolved.config
    # A folder of trials alone: results that were kept or passed on, of which a run goes on.
    ours = (results.LOCK, results.OWNER, "trials", "trials.csv")
    is_ours = run.path.is_dir() and all(entry.name in ours for entry in run.path.iterdir())
    is_ours = is_ours and ((run.path / "trials").is_dir() or not (run.path / "trials.csv").exists())
    if run.path.exists() and recorded is None and not is_ours:
        raise BadInput(f"run={run.path}: is there and is no run directory; give another path")
    if recorded and recorded["identity"] != resolved.identity:
        raise BadInput(f"run={run.path}: holds another space, other trial.* or other data.* values; give run=NEW")
    before = (recorded or {}).get("weights", {})
    if changed := [file for file, digest in resolved.weights.items() if before.get(file, digest) != digest]:
        raise BadInput(f"run={run.path}: {changed[0]} changed since its trials started from it; give run=NEW")
    for name in config.benchmark.runtimes or []:
        plugins.source("export.runtimes", name)
    plugins.source("harness.datasets", config.data.name)
    asha = config.search.scheduler == "asha"
    if asha and config.search.asha.grace_epochs >= config.trial.epochs > 1:
        raise BadInput(
            f"search.asha.grace_epochs={config.search.asha.grace_epochs}: must be less than "
            f"trial.epochs={config.trial.epochs}; give a smaller one or search.scheduler=fifo"
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
    cores = results.environment()["cores"]
    if (config.resources.cpus_per_trial or 0) > cores and not config.resources.address:
        raise BadInput(
            f"resources.cpus_per_trial={config.resources.cpus_per_trial:g}: this machine has {cores}; ask for less"
        )
    datasets.identity(config.data)


def check_trials(planner: "Planner", run: "RunDirectory") -> None:
    """BadInput where the run holds trials that are none of this command's: other images, or variants changed since."""
    from harness import results

    variants = planner.resolved.space.variants
    for record in run.trials():
        if results.trial_id(record["config"], record["seed"], planner.fingerprint) != record["id"]:
            raise BadInput(f"run={run.path}: trial {record['id']} is of other images; give run=NEW or restore the data")
        name = record["variant"]
        if name in variants and planner.trial("search", variants[name], seed=record["seed"]).id != record["id"]:
            raise BadInput(
                f"run={run.path}: variant {name} or the base was changed since trial {record['id']} was trained; give "
                "run=NEW, or the variant another name"
            )


def some_trials(resolved: plan.Resolved, planner: "Planner") -> "list[Trial]":
    """One of each variant, or of samples enough to see what they are like."""
    changes = [resolved.space.variants[name] for name in resolved.variants] or [planner.sample(i) for i in range(5)]
    return [planner.trial("check", change).config for change in changes]


def check_networks(resolved: plan.Resolved, planner: "Planner", data: "Dataset") -> None:
    """Build each network that may be asked for once; BadInput for an option that does not fit."""
    from harness import plugins
    from harness.batches import pick_device
    from harness.execution import Plan

    local = not resolved.config.resources.address
    for trial in some_trials(resolved, planner):
        try:
            plugins.build_network(trial, len(data.classes), data.input_size)
        except BadInput as error:
            others = "; search.variants=[...] trains others without it" if len(resolved.variants) > 1 else ""
            raise BadInput(f"{error}{others}") from error
        if trial.batch_size > len(data.train):
            raise BadInput(
                f"trial.batch_size={trial.batch_size}: more than the {len(data.train)} training images; give less"
            )
        if local:
            Plan.of(trial, pick_device(resolved.config.resources.device))


def run_json(
    resolved: plan.Resolved, data: "Dataset", trained: set[str], recorded: dict[str, Any] | None
) -> dict[str, Any]:
    """What run.json holds beside command lines and environment. Of earlier commands, `trained`: variants; `recorded`:
    what it held."""
    space = resolved.space
    variants = [name for name in space.variants if name in trained or name in resolved.variants]
    config = resolved.config.model_dump(mode="json")
    description = {
        "classes": data.classes,
        "fingerprint": data.fingerprint,
        "input_size": data.input_size,
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(data.test),
    }
    return {
        "config": config,
        "identity": resolved.identity,
        "weights": (recorded or {}).get("weights", {}) | resolved.weights,
        "pinned": dict(resolved.pinned),
        "parameters": {key: str(domain) for key, domain in resolved.space.parameters.items()},
        "variants": {name: dict(space.variants[name]) for name in variants},
        "claims": [vars(claim) for claim in resolved.claims_of(variants)],
        "published": {name: space.published[name] for name in variants if name in space.published},
        "data": description,
    }


def summary(run: "RunDirectory", config: Tune, failed: list[str], seconds: float, progress: "Progress") -> int:
    """Say how it ended; the exit code."""
    from harness import stats
    from harness.progress import duration

    records = run.trials()
    broken = [r for r in records if r["status"] in ("failed", "oom")]
    for record in broken:
        progress.line(f"{record['status']}: trial {record['id']}: {record['error']} ({run.trial_folder(record['id'])})")
    ranked = stats.ranking(records, config.search.metric)
    if ranked:
        best = ranked[0]
        tests = [r["metrics"]["test_accuracy"] for r in best.records if "test_accuracy" in r["metrics"]]
        text = f"best: {best.name}, {config.search.metric} {best.estimate.mean:.4f} over {best.estimate.n} seeds"
        if tests:
            text += f", test accuracy {sum(tests) / len(tests):.4f}"
        ties = sum(one.tied for one in ranked)
        text += f"; {ties} others cannot be told apart from it" if ties and best.estimate.n > 1 else ""
        progress.line(text)
    progress.line(f"done in {duration(seconds)}" + (f"; failed stages: {', '.join(failed)}" if failed else ""))
    if "report" in config.stages and "report" not in failed:
        progress.line(f"report {run.path / 'report' / 'index.html'}")
    return 1 if broken or failed else 0


if __name__ == "__main__":
    sys.exit(cli.run(Tune, main, __doc__ or "", plan.resolve))
