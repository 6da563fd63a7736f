"""Run directories, model folders and spaces that somebody else wrote, with valid digests: nothing in them executes
code, is written or deleted outside, or takes the memory of the machine."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import SMALL_RUN, TOP, command

from harness.config import BadInput
from harness.run import storage, trust
from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest

PAYLOAD = """
from pathlib import Path
Path({mark!r}).touch()
def build(num_classes):
    raise SystemExit
def identity(data):
    return "x"
decode = build
"""


@pytest.fixture
def foreign(small_run, tmp_path):
    """A copy of a run, a payload that leaves a mark if it runs, and a victim outside the run."""
    shutil.copytree(small_run[0], tmp_path / "run")
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(PAYLOAD.format(mark=str(mark)))
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("manifest.json", "model.safetensors", "model_x.onnx", "thesis.tex"):
        (victim / name).write_text(name)
    return RunDirectory(tmp_path / "run")


def edited(path: Path, change) -> None:
    """Change a sealed JSON file and seal it again."""
    value = storage.read_json(path)
    change(value)
    storage.write_json(path, value)


def parts(run: RunDirectory) -> tuple[Path, Path]:
    (manifest,) = run.path.glob("exported/*/manifest.json")
    return manifest, run.trial_folder(manifest.parent.name) / "trial.json"


def evil_trial(run):
    edited(parts(run)[1], lambda v: v["config"].update(architecture=str(run.path.parent / "evil.py")))


def evil_trial_relative(run):
    edited(parts(run)[1], lambda v: v["config"].update(architecture="../evil.py"))


def evil_data(run):
    edited(run.path / "run.json", lambda v: v["config"]["data"].update(name=str(run.path.parent / "evil.py")))


def evil_manifest(run):
    edited(parts(run)[0], lambda v: v["config"].update(architecture=str(run.path.parent / "evil.py")))


def aoti_manifest(run):
    manifest, _ = parts(run)
    content = b"no package"
    (manifest.parent / "model.pt2").write_bytes(content)
    entry = {"format": "aoti", "sha256": storage.sha256(manifest.parent / "model.pt2"), "bytes": len(content)}
    edited(manifest, lambda v: v["files"].update({"model.pt2": entry}))


EDITS = {
    "architecture in trial.json": evil_trial,
    "relative architecture in trial.json": evil_trial_relative,
    "data set in run.json": evil_data,
    "architecture in manifest.json": evil_manifest,
    "compiled file in manifest.json": aoti_manifest,
}
STAGES = {
    "export": ["-m", "export", "run=run"],
    "benchmarks": ["-m", "benchmarks", "run=run"],
    "inspect": ["-m", "harness.inspect", "run=run", "image=image.png"],
    "noise": ["-m", "benchmarks.noise", "run=run"],
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("edit", EDITS)
def test_code_that_a_run_names_is_not_trusted(edit, foreign, tmp_path):
    """In process: every stage command asks this first; test_stage_commands_run_no_foreign_code runs them."""
    EDITS[edit](foreign)
    os.chdir(foreign.path)
    try:
        with pytest.raises(BadInput, match=r"names .*(evil\.py|model\.pt2), whose code would run; look at"):
            trust.check_run(foreign, False)
        assert any("evil.py" in line or "model.pt2" in line for line in trust.check_run(foreign, True))
    finally:
        os.chdir(TOP)
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("edit", [name for name in EDITS if "relative" not in name])
def test_stage_commands_run_no_foreign_code(stage, edit, foreign, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    EDITS[edit](foreign)
    before = snapshot(tmp_path / "run")
    done = command(*STAGES[stage], cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert "add trust=true" in done.stderr
    assert not (tmp_path / "mark").exists()
    assert snapshot(tmp_path / "run") == before


def test_trust_is_of_path_and_content(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("a = 1\n")
    trust.remember(file)
    trust.check_names([str(file)], "x", False, "run=x")
    shutil.copy(file, tmp_path / "copy.py")
    with pytest.raises(BadInput, match=r"copy\.py, whose code would run"):
        trust.check_names([str(tmp_path / "copy.py")], "x", False, "run=x")
    file.write_text("a = 2\n")
    with pytest.raises(BadInput, match=r"net\.py, whose code would run"):
        trust.check_names([str(file)], "x", False, "run=x")


def test_a_foreign_winner_names_code(foreign, tmp_path):
    from harness.search.resolution import resolve

    edited(foreign.winner_file, lambda v: v["trial"].update(architecture=str(tmp_path / "evil.py")))
    with pytest.raises(BadInput, match=r"winner\.json names .*evil\.py, whose code would run"):
        resolve({"space": str(foreign.winner_file)})
    assert resolve({"space": str(foreign.winner_file), "trust": True}).config.trial.architecture.endswith("evil.py")


@pytest.mark.parametrize("form", ["dotted", "nested", "weights", "data"])
def test_a_foreign_winner_names_code_in_another_way(form, foreign, tmp_path):
    from harness.search.resolution import resolve

    evil = str(tmp_path / "evil.py")
    changes = {
        "dotted": lambda v: v["trial"].update({"trial.architecture": evil}),
        "nested": lambda v: v["trial"].update({"trial": {"architecture": evil}}),
        "weights": lambda v: v["trial"]["options"].update(weights=evil),
        "data": lambda v: v["data"].update(name=evil),
    }
    edited(foreign.winner_file, changes[form])
    with pytest.raises(BadInput, match=r"whose code would run|is no winner\.json of a run"):
        resolve({"space": str(foreign.winner_file)})


def test_a_compiled_file_under_another_name(foreign):
    manifest, _ = parts(foreign)
    edited(manifest, lambda v: v["files"]["model.onnx"].update(format="aoti"))
    with pytest.raises(BadInput, match="has not the suffix of its format, aoti"):
        Manifest.read(manifest)


def test_a_variant_that_names_a_path_leaves_the_report_in_place(foreign, tmp_path):
    from harness.reporting.figures import png, validation_curves
    from harness.reporting.page import _written

    (record,) = foreign.trials()[:1]
    figure = validation_curves(foreign.history(record.id).assign(trial="a", group="a"))
    _written(foreign, [("accuracy_x/../../../../victim/evil", "caption", figure)])
    assert png(figure)
    assert not list((tmp_path / "victim").glob("*.png"))
    assert (foreign.path / "report" / "figures" / "accuracy_x_____________victim_evil.png").is_file()


@pytest.mark.parametrize("module", ["harness.report", "harness.inspect"])
@pytest.mark.parametrize("name", ["run.log", "report", "a pipe"])
def test_commands_that_hold_no_lock_follow_no_link(name, module, foreign, tmp_path, monkeypatch, capsys):
    import importlib
    import sys

    if name == "a pipe":
        (foreign.path / "run.log").unlink()
        os.mkfifo(foreign.path / "run.log")
    else:
        LINKS[name](foreign, tmp_path / "victim")
    before = snapshot(tmp_path / "victim")
    more = ["image=x.png"] if "inspect" in module else []
    monkeypatch.setattr(sys, "argv", [module, f"run={foreign.path}", *more])
    assert importlib.import_module(module).main() == 2
    assert ("is a link" if name != "a pipe" else "is no file") in capsys.readouterr().err
    assert snapshot(tmp_path / "victim") == before


def linked_trial(run, victim):
    (folder,) = list((run.path / "trials").iterdir())[:1]
    shutil.rmtree(folder)
    folder.symlink_to(victim)


def linked(name):
    def make(run, victim):
        place = run.path / name
        if place.is_dir():
            shutil.rmtree(place)
        elif place.exists():
            place.unlink()
        place.symlink_to(victim if "." not in name.lstrip(".") else victim / "thesis.tex")

    return make


LINKS = {
    "a trial": linked_trial,
    **{name: linked(name) for name in ("trials", "exported", "report", "inspect", "run.log", "run.json", "trials.csv")},
    **{name: linked(name) for name in (".lock", ".owner", "inference.csv", "winner.json", "verdict.json")},
}


@pytest.mark.parametrize("link", LINKS)
def test_links_are_not_followed_for_writing(link, foreign, tmp_path):
    victim = tmp_path / "victim"
    LINKS[link](foreign, victim)
    before = snapshot(victim)
    with pytest.raises(BadInput, match=r"is a link; put what it leads to in its place"), foreign.locked():
        pass
    assert snapshot(victim) == before


def test_the_same_command_follows_no_link(foreign, tmp_path):
    """As a user would run it: the trial's folder is a link, and its files are none of ours."""
    linked_trial(foreign, tmp_path / "victim")
    before = snapshot(tmp_path / "victim")
    done = command(*SMALL_RUN, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert "is a link" in done.stderr
    assert snapshot(tmp_path / "victim") == before


@pytest.mark.parametrize("name", ["/abs/victim", "../../victim", "..", "", ".", "a/b", "x" * 300, "a\0b", "é\n"])
def test_an_id_is_a_name(name, foreign, tmp_path):
    _, file = parts(foreign)
    edited(file, lambda v: v.update(id=name.replace("/abs", str(tmp_path))))
    assert name not in [record.id for record in foreign.trials()]
    foreign.write_trials_csv()


@pytest.mark.parametrize("name", ["../victim/model_x.onnx", "/etc/passwd", "", "..", "a/b.onnx", "a\nb.onnx"])
def test_files_of_a_manifest_are_names(name, foreign):
    manifest, _ = parts(foreign)
    edited(manifest, lambda v: v["files"].update({name: next(iter(v["files"].values()))}))
    with pytest.raises(BadInput, match="is no name of a file"):
        Manifest.read(manifest)
