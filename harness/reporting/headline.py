"""The headline of a run, the same for report and command line: which configuration is best, how accurate it is, which
file to ship, and the reservations about each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from harness.reporting.words import METRIC_NAMES, changes, listed, measured, percent, space_name
from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest
from harness.run.progress import counted
from harness.run.recommendation import Recommendation
from harness.run.records import CORRECT_FILE, RunRecord, TrialRecord, read_correct
from harness.stats.accuracy import accuracy_interval
from harness.stats.claims import REASONABLE, Finding
from harness.stats.images import Correct, effective_images
from harness.stats.intervals import CONFIDENCE, seeds_interval
from harness.stats.ranking import Ranked, without_success

FEW_POINTS = 0.02  # a test set that leaves an accuracy more uncertain than this is said to be small
FEW_IN_CLASS = 10
WIDE = 0.5  # an interval of an accuracy that is wider says nothing


@dataclass(frozen=True)
class Headline:
    """`best`: which configuration is best; `facts`: text by label; `reservations`: what limits all of it."""

    best: str
    facts: Mapping[str, str] = field(default_factory=dict)
    reservations: Sequence[str] = ()

    @property
    def lines(self) -> list[str]:
        """The headline for the command line."""
        facts = [f"{name}: {text}" for name, text in self.facts.items()]
        return [f"best: {self.best}", *facts, *(f"reservation: {text}" for text in self.reservations)]


def headline(
    run: RunDirectory,
    recorded: RunRecord,
    ranked: Sequence[Ranked],
    manifest: Manifest | None = None,
    recommended: Recommendation | None = None,
    findings: Sequence[Finding] = (),
    records: Sequence[TrialRecord] = (),
) -> Headline:
    """The headline of a run with these trials; its winner has this manifest and recommendation, if it was exported and
    measured."""
    if not ranked:
        return Headline("no trial has finished")
    lost = without_success(records)
    best, images = ranked[0], recorded.data.test
    facts = {"Configuration": changes(best.records[0]) or f"the base of {space_name(recorded)}"}
    facts[METRIC_NAMES[recorded.metric].capitalize()] = f"{measured(best.estimate, recorded.metric)}{_seeds(best)}"
    tested = [record for record in best.records if record.metrics.test_accuracy is not None]
    if tested:
        facts["Test accuracy"] = mean_test_accuracy(
            [r.metrics.of("test_accuracy") for r in tested], images, correct_images(run, tested, images)
        )
    if manifest is not None and manifest.torch_accuracy is not None:
        own = accuracy_interval(manifest.torch_accuracy, images)
        chosen = "" if len(best.records) == 1 else f", the seed with the best {METRIC_NAMES[recorded.metric]}"
        facts["Exported trial"] = f"{manifest.id}{chosen}: test accuracy {measured(own, 'test_accuracy')} (test images)"
    if recommended is not None:
        at_chance = all(record.is_at_chance for record in best.records)
        facts["Recommendation"] = "none: there is no winner" if at_chance else recommended.sentence
    reservations = [*ranking_reservations(ranked), *image_reservations(recorded), *_of_looks(recorded)]
    if lost:
        statuses = sorted({str(record.status) for own in lost.values() for record in own})
        reservations.insert(0, f"no trial of {listed(list(lost))} has finished ({listed(statuses)})")
    confirmed = [r.status for r in records if r.stage == "confirm"]
    if confirmed and "finished" not in confirmed:
        reservations.insert(0, "no trial on a fresh seed has finished: the ranking is that of the search")
    if noisy := _too_noisy(findings, records):
        reservations.append(noisy)
    return Headline(best_sentence(ranked, recorded.metric, len(lost)), facts, reservations)


def best_sentence(ranked: Sequence[Ranked], metric: str, lost: int = 0) -> str:
    """Which configuration is best, and whether that is shown; `lost`: configurations whose trials all failed."""
    best, name = ranked[0], METRIC_NAMES[metric]
    if all(record.is_at_chance for record in best.records):
        level = percent(best.records[0].metrics.val_chance or 0.0)
        return (
            f"no winner: {best.name}, which comes first, answers no better than always the most frequent class "
            f"({level} % of the validation images)"
        )
    most = "lowest" if metric == "val_loss" else "highest"
    tied, worse = [one.name for one in ranked if one.tied], sum(one.is_worse for one in ranked)
    below = len(ranked) - 1 - len(tied) - worse + lost  # for their failed seeds
    if len(ranked) + lost == 1:
        return f"{best.name}, the only configuration"
    if len(ranked) - 1 + lost == below:
        return f"{best.name} is the only configuration with {'so few' if best.failed else 'no'} failed seeds"
    of = f"{1 + len(tied) + worse} configurations" + (" with as few failed seeds" if below else "")
    if all(one.estimate.n == 1 for one in ranked):
        runs = f"{len(ranked)} single runs"
        return f"{best.name} has the {most} {name} of {runs}; one seed each cannot show that it is best"
    text = f"{best.name} has the {most} mean {name} of {of}"
    if best.estimate.n == 1:
        text = f"{best.name} has the {most} {name} of {of}, in a single run"
    if tied:
        return f"{text}; not shown to be better than {listed(tied)}"
    return f"{text}, better than the other{'s' if worse > 1 else ''} at 95 %"


def _seeds(best: Ranked) -> str:
    interval = " with its interval over seeds" if best.estimate.low == best.estimate.low else ""
    return "" if best.estimate.n == 1 else f", mean of {counted(best.estimate.n, 'seed')}{interval}"


def mean_test_accuracy(values: Sequence[float], images: int, correct: Correct | None) -> str:
    """Mean test accuracy with what other seeds and other test images would change, in points at 95 %.

    `correct`: bool [seeds, images], whether each seed's network classifies each image correctly.
    """
    mean, over = fmean(values), seeds_interval(values)
    if len(values) == 1:
        seeds = "one seed: what other seeds would change is unknown"
    elif over.low != over.low:
        seeds = f"all {len(values)} seeds alike: what others would change is unknown"
    else:
        seeds = f"other seeds: ±{percent(over.high - mean)} points"
    other = accuracy_interval(mean, images if correct is None else effective_images(correct))
    mean_of = f", mean of {counted(len(values), 'seed')}" if len(values) > 1 else ""
    return f"{percent(mean)} %{mean_of} ({seeds}; other test images: {percent(other.low)} to {percent(other.high)} %)"


def correct_images(run: RunDirectory, records: Sequence[TrialRecord], images: int) -> Correct | None:
    """Which test `images` the networks of these trials classify correctly; None where a trial did not keep it."""
    import numpy as np

    kept = []
    for record in records:
        correct = read_correct(run.trial_folder(record.id), record, images)
        if correct is not None:
            kept.append(correct)
        elif record.correct_sha256 is not None:
            run.notice(f"{run.trial_folder(record.id) / CORRECT_FILE}: is corrupt or missing; left out")
    return np.stack(kept) if kept and len(kept) == len(records) else None


def ranking_reservations(ranked: Sequence[Ranked]) -> list[str]:
    """Failed seeds, and deviations that are unknown because the seeds agree."""
    found = []
    for one in ranked:
        if one.failed:
            status = listed(sorted({_status(record) for record in one.failed}))
            of = len(one.failed) + len(one.records)
            where = "" if one is ranked[0] else ", which ranks it below configurations with fewer failed seeds"
            found.append(f"{len(one.failed)} of {counted(of, 'seed')} of {one.name} failed ({status}){where}")
    best = ranked[0].estimate
    if best.n > 1 and best.high - best.low > WIDE:
        ends = f"{percent(max(0.0, best.low))} to {percent(min(1.0, best.high))} %"
        found.append(
            f"the interval of {ranked[0].name} over {best.n} seeds, {ends}, says nothing: more seeds would narrow it"
        )
    if best.n > 1 and best.low != best.low:
        found.append(f"the {best.n} seeds of {ranked[0].name} are alike, so how much seeds differ is unknown")
    return found


def _status(record: TrialRecord) -> str:
    return "at chance level" if record.is_at_chance else record.status


def image_reservations(recorded: RunRecord) -> list[str]:
    """A test set too small to say much, as a whole or of a class."""
    images, found = recorded.data.test, []
    widest = accuracy_interval(0.9, images)
    half = (widest.high - widest.low) / 2
    if half > FEW_POINTS:
        found.append(
            f"{counted(images, 'test image')}: an accuracy of 90 % would be known to ±{percent(half)} points only"
        )
    counts = zip(recorded.data.classes, recorded.data.test_by_class, strict=False)
    few = [f"{name} ({count})" for name, count in counts if count < FEW_IN_CLASS]
    if few:
        found.append(
            f"classes with fewer than {FEW_IN_CLASS} test images, whose own accuracy says little: {listed(few)}"
        )
    return found


def _of_looks(recorded: RunRecord) -> list[str]:
    """Seeds added after a look without a plan: each look at the claims may err."""
    alpha = sum(look.alpha for look in recorded.looks)
    if not recorded.claims or alpha <= 1 - CONFIDENCE + 1e-9:
        return []
    seeds = listed([str(look.seeds) for look in recorded.looks])
    return [
        f"the claims were tested after {seeds} seeds, which were not all planned: the chance that one is settled "
        f"wrongly is up to {100 * alpha:.0f} %, not 5 %; search.seeds=auto from the start plans the looks"
    ]


def _too_noisy(findings: Sequence[Finding], records: Sequence[TrialRecord]) -> str:
    """Questions that a reasonable number of seeds cannot settle, with the usual causes if the trials have them."""
    open_ones = [one for one in findings if one.seeds is not None and one.seeds[0] > REASONABLE]
    if not open_ones:
        return ""
    names = {name for one in open_ones for name in (one.variant, one.than)}
    trials = [record.trial for record in records if record.variant in names]
    causes = [
        *(
            ["a constant learning rate (avoided by trial.schedule.name=linear)"]
            if any(t.schedule.name == "constant" for t in trials)
            else []
        ),
        *(["an early stop (by trial.early_stop=none)"] if any(t.early_stop is not None for t in trials) else []),
    ]
    worst = max(one.deviation for one in open_ones)
    text = f"seeds differ by up to {100 * worst:.1f} points (standard deviation), too much to settle "
    text += f"{counted(len(open_ones), 'claim')} with {REASONABLE} seeds"
    if causes:
        text += f"; usual causes: {' and '.join(causes)}"
    return text
