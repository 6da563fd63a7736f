"""The stages that train: search and confirm. Each runs only the missing trials."""

import time

from harness.run.directory import RunDirectory
from harness.run.progress import Progress
from harness.run.records import LookRecord
from harness.search.trials import TrialGenerator, TrialSpec
from harness.stats.claims import judge_claims
from harness.stats.sequential import is_planned, looks_of
from tune_spaces import Claim


def search_stage(generator: TrialGenerator, run: RunDirectory, progress: Progress) -> None:
    """Run the missing trials of the space."""
    from harness.search.runner import run_optuna, run_trials

    if generator.asks_optuna:
        wanted = range(generator.search.samples)
        done = [r for r in run.trials() if r.stage == "search" and (r.index not in wanted or r.is_done)]
        taken = {r.index for r in done}
        indices = [i for i in wanted if i not in taken]
        progress.line(f"search: {len(indices)} samples to run with Optuna, {len(taken)} done before")
        if indices:
            run.remove(lambda r: r.stage == "search" and r.index in indices)
            run_optuna(indices, generator, run, progress)
    elif generator.resolved.space.variants:
        run_ablation(generator, run, progress)
    else:
        trials = generator.search_trials()
        missing = missing_of(trials, run, progress)
        if missing:
            seconds = generator.search.time_budget_seconds
            run_trials(missing, len(trials), generator, run, progress, scheduler=True, seconds=seconds)
    run.write_trials_csv()


def run_ablation(generator: TrialGenerator, run: RunDirectory, progress: Progress) -> None:
    """Train the variants and record the looks at their claims. With seeds=auto, variants of claims that are not settled
    get more seeds, up to the last look or the end of the time budget."""
    from harness.search.runner import run_trials

    resolved, search, started = generator.resolved, generator.search, time.monotonic()
    claims, variants = [Claim(**claim) for claim in run.recorded().claims], resolved.variants
    planned = is_planned(one.alpha for one in run.recorded().looks)  # which is kept, whatever is asked for now
    of = len(generator.search_trials())
    failed: set[str] = set()  # of this command: one retry is for the next
    for number, look in enumerate(looks_of(search.seeds)):
        seeds = look.number or int(search.seeds)
        trials = [spec for spec in generator.repeats(seeds, variants) if spec.id not in failed]
        budget = search.time_budget_seconds
        left = None if budget is None else max(1.0, budget - (time.monotonic() - started))
        missing = missing_of(trials, run, progress)
        if missing:
            run_trials(missing, of, generator, run, progress, scheduler=False, seconds=left)
        records = run.trials()
        failed |= {r.id for r in records if r.is_failure}
        if not {spec.id for spec in trials} <= {r.id for r in records if r.is_done or r.is_failure}:
            return  # out of time: a look at fewer seeds than were fixed beforehand does not count
        looks = looks_of("auto") if planned else looks_of(search.seeds)[: number + 1]
        findings = judge_claims(claims, records, looks)
        still_open = [one for one in findings if one.is_open]
        settled = len(findings) - len(still_open)
        is_news = bool(missing) or not run.recorded().looks
        if is_news and not (planned and look.number is None):  # judged by the plan, more seeds change nothing
            run.record_look(LookRecord(seeds=seeds, alpha=look.alpha, claims=len(findings), settled=settled))
        if claims:
            progress.line(f"search: {settled} of {len(findings)} claims settled after {seeds} seeds")
        variants = [name for name in variants if any(name in (one.variant, one.than) for one in still_open)]
        if not variants:
            return


def missing_of(trials: list[TrialSpec], run: RunDirectory, progress: Progress) -> list[TrialSpec]:
    """The trials that still have to run; removes the files of failed and interrupted ones, except checkpoints."""
    ids = {spec.id for spec in trials}
    run.remove(lambda r: r.id in ids and not r.is_done, continued=ids)
    done = {r.id for r in run.trials() if r.id in ids}
    missing = [spec for spec in trials if spec.id not in done]
    progress.line(f"{trials[0].stage}: {len(missing)} trials to run, {len(done)} done before")
    return missing


def confirm_stage(generator: TrialGenerator, run: RunDirectory, progress: Progress) -> None:
    """Train the best configurations of a search on fresh seeds; then read the test split, for the winner alone.

    Raises RuntimeError where no trial has finished.
    """
    from harness.search.runner import run_trials
    from harness.stats.ranking import rank
    from harness.training.evaluation import read_test

    settings, config = generator.search, generator.resolved.config
    searched = rank([r for r in run.trials() if r.stage == "search"], settings.metric)
    if not searched:
        raise RuntimeError("no trial has finished: nothing to confirm")
    if generator.resolved.space.variants:
        progress.line("confirm: skipped, an ablation trains each variant on several seeds")
    elif len(searched) == 1 or settings.confirm == 0:
        progress.line(
            "confirm: skipped, only one candidate" if len(searched) == 1 else "confirm: skipped, search.confirm=0"
        )
    else:
        trials = generator.confirmations([one.records[0] for one in searched[: settings.confirm]])
        missing = missing_of(trials, run, progress)
        if missing:
            run_trials(missing, len(trials), generator, run, progress, scheduler=False)
    winner = rank(run.trials(), settings.metric)[0]  # a searched one, if none of the fresh seeds has finished
    for record in winner.records:
        if record.metrics.test_accuracy is None:
            progress.status(f"reading the test set for {record.id}")
            read_test(run.trial_folder(record.id), record, config.data, config.resources.device)
    run.write_trials_csv()
