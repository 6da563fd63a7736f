"""Every space of the folder is sound, and draws are what they promise."""

import dataclasses
import json

import pytest
from conftest import run_record

from harness.config import BadInput, plugins
from harness.run.directory import RunDirectory
from harness.run.records import TrialRecord
from harness.search.resolution import resolve
from harness.search.trials import TrialGenerator
from harness.training.network import build_network
from tune_spaces import Choice, Claim, Integer, LogUniform, Space, Uniform

ALL = plugins.names("tune_spaces")


@pytest.mark.parametrize("name", ALL)
def test_every_trial_of_a_space_is_a_network(name):
    resolved = resolve({"space": name})
    planner = TrialGenerator(resolved, "fingerprint")
    space = resolved.space
    changes = list(space.variants.values()) or [planner.sample(i) for i in range(5)]
    for change in changes:
        trial = planner.trial("search", change).config
        if trial.options.get("weights") == "imagenet":  # cannot be downloaded in tests
            trial = trial.model_copy(update={"options": {**trial.options, "weights": "none"}})
        build_network(trial, 10, 32)


@pytest.mark.parametrize("name", ALL)
def test_docstring_says_what_to_expect(name):
    doc = plugins.load("tune_spaces", name, "__doc__")
    assert "xpect" in doc or "ublished test accurac" in doc
    assert "CPU cores" in doc


@pytest.mark.parametrize("name", ALL)
def test_ids_are_unique(name):
    planner = TrialGenerator(resolve({"space": name, "search.algorithm": "random", "search.samples": "20"}), "f")
    ids = [planned.id for planned in planner.search_trials()]
    assert len(set(ids)) == len(ids)


def planner(**values) -> TrialGenerator:
    return TrialGenerator(resolve({"space": "quick", **values}), "fingerprint")


def test_sample_is_the_same_draw_however_many_there_are():
    few, many = planner(), planner(**{"search.samples": 50})
    assert [t.id for t in few.search_trials()] == [t.id for t in many.search_trials()][:4]
    assert many.sample(17) == planner().sample(17)
    assert planner().sample(0) == {}
    assert planner(**{"search.seed": 1}).sample(3) != planner().sample(3)


def test_keys_are_those_of_the_command_line():
    """With `trial.` or without: the same trials, the same draws."""
    short = Space(trial={"epochs": 3}, parameters={"optimizer.lr": Choice([0.1])}, variants={})
    full = Space(trial={"trial.epochs": 3}, parameters={"trial.optimizer.lr": Choice([0.1])})
    assert short == full
    assert Space(trial={}, variants={"a": {"trial.epochs": 1}}).variants == {"a": {"epochs": 1}}


def test_draws_stay_in_range():
    import random

    generator = random.Random(0)
    for domain, low, high in ((Uniform(-1, 2), -1, 2), (LogUniform(1e-5, 1e-1), 1e-5, 1e-1), (Integer(2, 5), 2, 5)):
        values = [domain.draw(generator) for _ in range(500)]
        assert min(values) >= low
        assert max(values) <= high
    assert {Integer(2, 5).draw(generator) for _ in range(200)} == {2, 3, 4, 5}
    # half of a logarithmic draw lies below the geometric middle
    below = sum(LogUniform(1e-4, 1e-2).draw(generator) < 1e-3 for _ in range(1000))
    assert 430 < below < 570


@pytest.mark.parametrize(
    "make",
    [lambda: Uniform(1, 1), lambda: LogUniform(0, 1), lambda: Integer(3, 2), lambda: Choice([])],
)
def test_bad_domains_say_so(make):
    with pytest.raises(ValueError, match=r"Uniform|Integer|Choice"):
        make()


def test_variants_and_parameters_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        Space({}, parameters={"epochs": Integer(1, 2)}, variants={"a": {}})


def test_pinned_parameter_leaves_the_search():
    pinned = planner(**{"trial.optimizer.lr": 1e-3})
    assert "optimizer.lr" not in pinned.sample(1)
    assert all(t.config.optimizer.lr == 1e-3 for t in pinned.search_trials())


def test_variants_have_seeds_and_read_the_test_set():
    values = {"space": "published", "search.variants": ["baseline", "model1"], "search.seeds": 2}
    trials = TrialGenerator(resolve(values), "f").search_trials()
    assert [(t.variant, t.seed) for t in trials] == [("baseline", 0), ("model1", 0), ("baseline", 1), ("model1", 1)]
    assert all(t.read_test for t in trials)
    assert not any(t.read_test for t in planner().search_trials())


def test_pinning_what_variants_change_is_bad_input():
    with pytest.raises(BadInput, match=r"trial\.optimizer\.lr=0\.1: the variants model1_adam, final"):
        resolve({"space": "published", "trial.optimizer.lr": 0.1})


def test_pinning_what_variants_change_that_are_not_asked_for():
    values = {"space": "published", "trial.optimizer.lr": 0.1, "search.variants": ["baseline", "model1"]}
    trials = TrialGenerator(resolve(values), "f").search_trials()
    assert {t.config.optimizer.lr for t in trials} == {0.1}


def test_other_weights_are_another_run(tmp_path):
    """A file of weights that changed is refused, named by the base, a variant or a parameter; one that is gone not."""
    from harness.search.checks import check_before_start

    file = tmp_path / "weights.safetensors"
    text = "from tune_spaces import Choice, Space\nSPACE = Space({'architecture': 'transfer'}, {'name': 'digits'}, "
    (tmp_path / "variants.py").write_text(f"{text} variants={{'a': {{}}, 'b': {{'options.weights': '{file}'}}}})")
    (tmp_path / "search.py").write_text(f"{text} parameters={{'options.weights': Choice(['none', '{file}'])}})")
    for values in (
        {"space": "transfer", "data.name": "digits", "trial.options.weights": str(file)},
        {"space": str(tmp_path / "variants.py")},
        {"space": str(tmp_path / "search.py")},
    ):
        resolved = resolve(values)
        run = RunDirectory(tmp_path / "run")
        file.write_text("one")
        recorded = run_record()
        recorded.identity, recorded.weights = resolved.identity, resolved.weights
        assert list(recorded.weights) == [str(file)]
        check_before_start(resolved, run, recorded)
        earlier = run_record()
        earlier.identity = resolved.identity
        check_before_start(resolved, run, earlier)  # of a run before they were recorded
        file.write_text("two")
        with pytest.raises(BadInput, match=r"weights\.safetensors changed since"):
            check_before_start(resolved, run, recorded)
        file.unlink()
        check_before_start(resolved, run, recorded)


def test_confirmation_uses_fresh_seeds():
    p = planner()
    searched = {t.seed for t in p.search_trials()}
    records = [
        TrialRecord(parameters=dict(t.parameters), index=t.index, seed=t.seed, config={}, status="finished")
        for t in p.search_trials()[:2]
    ]
    confirmed = p.confirmations(records)
    assert len(confirmed) == 4
    assert not searched & {t.seed for t in confirmed}
    assert len({t.id for t in confirmed}) == 4


def test_grid():
    p = planner(**{"search.algorithm": "grid", "trial.optimizer.lr": 1e-3, "trial.optimizer.weight_decay": 0.0})
    assert [t.config.options["activation"] for t in p.search_trials()] == ["mish", "relu"]
    with pytest.raises(BadInput, match="a grid needs Choice or Integer"):
        planner(**{"search.algorithm": "grid"}).search_trials()


def test_run_directory_is_found_again():
    def run(**values):
        return resolve({"space": "quick", **values}).run.name

    assert run() == run(**{"search.samples": 9, "search.seeds": 4, "stages": ["report"], "benchmark.rounds": 5})
    assert run() != run(**{"trial.epochs": 2})
    assert run() != run(**{"data.limit": 20})
    assert run(**{"trial.epochs": 2}) != run(**{"trial.epochs": 3})


def test_another_architecture_leaves_the_options_behind():
    other = planner(**{"trial.architecture": "baseline"})
    assert other.trial("search", {}).config.options == {}
    assert "options.activation" not in other.sample(1)
    resolved = resolve({"space": "quick", "trial.architecture": "baseline", "trial.options.dropout": 0.5})
    assert resolved.config.trial.options == {"dropout": 0.5}
    changed = planner().trial("search", {"architecture": "model1", "options.kernel_size": 5}).config
    assert changed.options == {"kernel_size": 5}


def test_pinned_options_hold_for_every_architecture():
    values = {"space": "published", "trial.options.hidden": [128], "search.variants": ["baseline", "model1"]}
    trials = TrialGenerator(resolve(values), "f").search_trials()
    assert all(t.config.options["hidden"] == [128] for t in trials)


def test_run_directory_does_not_depend_on_spelling():
    one = resolve({"space": "quick", "trial.epochs": "3", "trial.optimizer.lr": "1e-3"})
    other = resolve({"space": "quick", "trial.optimizer.lr": "0.001", "trial.epochs": "3"})
    assert one.run == other.run
    assert one.pinned == {"epochs": 3, "optimizer.lr": 1e-3}


def test_values_of_options_are_as_given():
    """Mappings are values too; tuples are the lists that run.json will hold, so that the same call continues."""
    resolved = resolve({"space": "quick", "trial.options.parts": {"depth": 3}, "trial.options.hidden": (8,)})
    assert resolved.pinned == {"options.parts": {"depth": 3}, "options.hidden": [8]}
    assert resolved.identity == json.loads(json.dumps(resolved.identity))


def test_variants_that_are_the_same_are_refused(tmp_path):
    (tmp_path / "space.py").write_text(
        "from tune_spaces import Space\n"
        "SPACE = Space(trial={'architecture': 'baseline', 'optimizer.lr': 0.1},"
        " variants={'plain': {}, 'again': {'optimizer.lr': 0.1}})\n"
    )
    planned = TrialGenerator(resolve({"space": str(tmp_path / "space.py")}), "f")
    with pytest.raises(BadInput, match="variants plain and again are the same configuration"):
        planned.search_trials()


@pytest.mark.parametrize(
    ("claim", "told"),
    [
        ({"metric": "val_accuracy"}, "choose test_accuracy or gap"),
        ({"margin": 0.0}, "fraction above 0"),
        ({"than": "a"}, "with itself"),
        ({"than": "c"}, "c, which the space has no variant of"),
    ],
)
def test_claims_that_cannot_be_judged(claim, told):
    with pytest.raises(ValueError, match=told):
        Space({}, variants={"a": {}, "b": {}}, claims=[Claim(**{"says": "", "variant": "a", "than": "b"} | claim)])


def test_without_claims_each_variant_is_compared_with_the_first():
    resolved = resolve({"space": "published"})
    assert [c.than for c in resolved.claims_of(["model1", "model1_adam", "model2"])] == ["model1_adam", "model1"]
    bare = dataclasses.replace(resolved, space=dataclasses.replace(resolved.space, claims=()))
    assert [(c.variant, c.than) for c in bare.claims_of(["a", "b", "c"])] == [("b", "a"), ("c", "a")]


def test_a_winner_is_a_space(small_run):
    """winner.json has the whole configuration of a run's winner; given values pin what they set, as of any space."""
    run = RunDirectory(small_run[0])
    winner = json.loads((run.path / "winner.json").read_text())
    resolved = resolve({"space": str(run.path / "winner.json"), "trial.epochs": 7})
    record = next(r for r in run.trials() if r.id == winner["id"])
    assert resolved.base == record.trial.model_dump(mode="json") | {"epochs": 7}
    assert resolved.config.data.model_dump(mode="json") == run.recorded().config["data"]
    assert not resolved.space.parameters
    assert resolved.run.name.startswith("winner-")


def test_what_is_no_winner_is_refused(tmp_path):
    for name, text in (("absent", None), ("empty", "{}"), ("other", '{"trial": 3}')):
        if text is not None:
            (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(BadInput, match=r"space=.*(does not exist|is no winner.json of a run).*; give one that"):
            resolve({"space": str(tmp_path / f"{name}.json")})
