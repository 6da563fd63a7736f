"""Run directories, model folders and spaces that somebody else wrote, with valid digests: nothing in them executes
code, is written or deleted outside, or takes the memory of the machine."""

import os
import shutil

import pytest
from conftest import TOP
from hostile_runs import EDITS, LINKS, PAYLOAD, WINNERS, edited, parts, snapshot

from harness.config import BadInput
from harness.run import trust
from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest


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


@pytest.mark.parametrize("edit", EDITS)
def test_code_that_a_run_names_is_not_trusted(edit, foreign, tmp_path):
    """In process: every stage command asks this first; tests/test_watched.py runs them."""
    EDITS[edit](foreign)
    os.chdir(foreign.path)
    try:
        with pytest.raises(BadInput, match=r"names .*(evil\.py|model\.pt2), whose code would run; look at"):
            trust.check_run(foreign, False)
        assert any("evil.py" in line or "model.pt2" in line for line in trust.check_run(foreign, True))
    finally:
        os.chdir(TOP)
    assert not (tmp_path / "mark").exists()


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


@pytest.mark.parametrize("form", WINNERS)
def test_a_foreign_winner_names_code_in_another_way(form, foreign, tmp_path):
    from harness.search.resolution import resolve

    edited(foreign.winner_file, lambda value: WINNERS[form](value, str(tmp_path / "evil.py")))
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


@pytest.mark.parametrize("module", ["harness.report", "harness.inspect"])
def test_a_log_that_is_also_another_file(module, foreign, tmp_path, monkeypatch, capsys):
    """A hard link: the log is appended to."""
    import importlib
    import sys

    victim = tmp_path / "victim" / "thesis.tex"
    (foreign.path / "run.log").unlink()
    (foreign.path / "run.log").hardlink_to(victim)
    more = ["image=x.png"] if "inspect" in module else []
    monkeypatch.setattr(sys, "argv", [module, f"run={foreign.path}", *more])
    assert importlib.import_module(module).main() == 2
    assert "run.log is also another file" in capsys.readouterr().err
    assert victim.read_text() == "thesis.tex"


UNSHOWABLE = {
    "classes of a million characters": lambda v: v["data"]["classes"].__setitem__(0, "x" * 1_000_000),
    "half a character": lambda v: v["data"]["classes"].__setitem__(0, "\ud800"),
    "100,000 classes": lambda v: v["data"].update(classes=[str(n) for n in range(100_000)]),
    "claims of another form": lambda v: v.update(claims=[{"text": 1}]),
    "a note of other type": lambda v: v["data"].update(notes=[3]),
    "published as text": lambda v: v.update(published={"a": "x"}),
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(one, marks=[pytest.mark.slow] if "00" in one or "million" in one else []) for one in UNSHOWABLE],
)
def test_a_run_that_cannot_be_shown(kind, foreign, monkeypatch, capsys):
    import importlib
    import sys
    import time

    edited(foreign.path / "run.json", UNSHOWABLE[kind])
    (foreign.path / "run.copy.json").unlink()
    monkeypatch.setattr(sys, "argv", ["report", f"run={foreign.path}"])
    started = time.monotonic()
    code = importlib.import_module("harness.report").main()
    assert time.monotonic() - started < 20
    line = capsys.readouterr().err
    assert (code, line.count("\n"), len(line) <= 301) == (2, 1, True) or (code, line) == (0, ""), line


@pytest.mark.parametrize("link", LINKS)
def test_links_are_not_followed_for_writing(link, foreign, tmp_path):
    victim = tmp_path / "victim"
    LINKS[link](foreign, victim)
    before = snapshot(victim)
    with pytest.raises(BadInput, match=r"is a link; put what it leads to in its place"), foreign.locked():
        pass
    assert snapshot(victim) == before


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
