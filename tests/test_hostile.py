"""Run directories, model folders and spaces that somebody else wrote, with valid digests: nothing in them executes
code, is written or deleted outside, or takes the memory of the machine."""

import contextlib
import os
import shutil
import time
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


# Files that a reader refuses, with less than a GiB of memory and in less than 20 s.
def huge(path, size=200 << 20):
    with path.open("wb") as file:
        file.truncate(size)


REFUSED_JSON = {
    "of 200 MB": huge,
    "empty": lambda p: p.write_bytes(b""),
    "a list": lambda p: sealed(p, b"[\n  1"),
    "nested": lambda p: sealed(p, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000),
    "not UTF-8": lambda p: sealed(p, b'{"a": "\xff"'),
    "a FIFO": lambda p: (p.unlink(missing_ok=True), os.mkfifo(p)),
    "a folder": lambda p: (p.unlink(missing_ok=True), p.mkdir()),
    "a device": lambda p: (p.unlink(missing_ok=True), p.symlink_to("/dev/zero")),
    "a link to nothing": lambda p: (p.unlink(missing_ok=True), p.symlink_to("/no/where")),
    "NaN": lambda p: sealed(p, b'{"seed": NaN, "config": NaN, "status": NaN'),
    "of numbers": lambda p: sealed(p, b'{"seed": 1, "config": 3, "status": 5'),
    "of an unknown status": lambda p: sealed(p, b'{"seed": 1, "config": {}, "status": "won"'),
}


def sealed(path, body):
    import hashlib

    path.write_bytes(body + b',\n  "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n')


@pytest.mark.parametrize("kind", REFUSED_JSON)
@pytest.mark.parametrize("file", ["trial.json", "run.json", "manifest.json", "verdict.json", "winner.json"])
def test_json_that_is_none_of_ours(file, kind, foreign):
    manifest, trial = parts(foreign)
    path = {"trial.json": trial, "manifest.json": manifest}.get(file, foreign.path / file)
    REFUSED_JSON[kind](path)
    if file == "run.json":
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else None
        (foreign.path / "run.copy.json").unlink()
    started = time.monotonic()
    read_all(foreign)
    assert time.monotonic() - started < 20


def read_all(run: RunDirectory) -> None:
    """Read all that a command reads; nothing but BadInput, Corrupt or an absent file may come of it."""
    from export.exporter import is_exported
    from harness.config import Export
    from harness.reporting.results import Results

    for read in (
        lambda: run.configuration(),
        lambda: trust.check_run(run, False),
        lambda: Results.of(run).headline,
        lambda: [run.history(record.id) for record in run.trials()],
        lambda: [is_exported(run.exported_folder(r.id), r, Export()) for r in run.trials()],
        lambda: run.set_aside_corrupt(),
    ):
        if run.configuration_file.is_file():
            with contextlib.suppress(BadInput, storage.Corrupt):
                read()
