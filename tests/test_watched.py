"""Whatever a command gets from somebody else, with strace as the witness: one line at most, within 20 s; nothing is
written outside, nothing executed, nobody called; less than 1 GiB of memory, or 4 GiB where an ONNX file is served."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import hostile_images
import hostile_models
import hostile_runs
import pytest
from conftest import SMALL_RUN
from hostile_runs import PAYLOAD, parts
from image_folders import made
from PIL import Image
from test_image_files import REFUSED
from watched import Watched, is_possible, watch

from harness.run.directory import RunDirectory

pytestmark = pytest.mark.slow


@dataclass
class Inputs:
    """Makes the input of each case in a folder of its own. `cases`: for `watch`; `said`: what the error must say, None
    where the command may also succeed and then write into its run."""

    top: Path
    small_run: Path
    cases: dict[str, tuple[str, list[str], Path]] = field(default_factory=dict)
    said: dict[str, str | None] = field(default_factory=dict)

    def add(self, name: str, folder: Path, said: str | None, module: str, *arguments: str) -> None:
        assert name not in self.cases, name
        self.cases[name], self.said[name] = (module, list(arguments), folder), said

    def folder(self) -> Path:
        folder = self.top / str(len(self.cases))
        folder.mkdir(parents=True)
        return folder

    def run(self) -> tuple[RunDirectory, Path]:
        """A copy of a run, with a victim and a payload beside it."""
        folder = self.folder()
        shutil.copytree(self.small_run, folder / "run")
        (folder / "evil.py").write_text(PAYLOAD.format(mark=str(folder / "mark")))
        (folder / "victim").mkdir()
        for name in ("manifest.json", "model.safetensors", "model_x.onnx", "thesis.tex"):
            (folder / "victim" / name).write_text(name)
        Image.new("RGB", (8, 8)).save(folder / "image.png")
        return RunDirectory(folder / "run"), folder

    def models(self) -> None:
        for kind, (content, said) in hostile_models.ONNX.items():
            file = hostile_models.folder_of(self.folder() / "m", "model.onnx", content)
            self._predict(f"ONNX, {kind}", file, said)
        for kind, (content, said) in hostile_models.TORCH.items():
            folder = self.folder()
            if content == "pickle":
                content = hostile_models.pickle.dumps(hostile_runs.Payload(folder / "mark"))
            self._predict(
                f"weights, {kind}", hostile_models.folder_of(folder / "m", "model.safetensors", content), said
            )
        for number, (changes, said) in enumerate(hostile_models.MANIFESTS):
            name = "model.safetensors" if "config" in changes else "model.onnx"
            content = hostile_models.model().SerializeToString()
            file = hostile_models.folder_of(self.folder() / "m", name, content, **changes)
            self._predict(f"manifest {number}", file, said)

    def _predict(self, name: str, file: Path, said: str) -> None:
        self.add(name, file.parent, said, "export.predict", f"model={file}", f"image={file.parent}/image.png")

    def images(self) -> None:
        for kind in hostile_images.LARGE:
            root = made(self.folder() / "data")
            hostile_images.write(kind, root / "cat")
            self._dry(f"image, {kind}", root, "cat/a.")
        for kind, (name, make, said) in REFUSED.items():
            root = made(self.folder() / "data")
            make(root / "cat" / name)
            self._dry(f"image, {kind}", root, said)

    def _dry(self, name: str, root: Path, said: str) -> None:
        given = ("space=quick", "data.name=images", f"data.root={root}", "dry_run=true")
        self.add(name, root.parent, said, "harness.tune", *given)

    def code(self) -> None:
        stages = {"export": [], "benchmarks": [], "harness.inspect": ["image=image.png"], "benchmarks.noise": []}
        for kind, edit in hostile_runs.EDITS.items():
            for stage, more in stages.items():
                run, folder = self.run()
                edit(run)
                start = folder if "relative" not in kind else run.path
                more = [one.replace("=image", f"={folder}/image") for one in more]
                self.add(f"{stage}, {kind}", start, "add trust=true", stage, f"run={run.path}", *more)
        for form, change in hostile_runs.WINNERS.items():
            run, folder = self.run()
            hostile_runs.edited(run.winner_file, lambda v, c=change, f=folder: c(v, str(f / "evil.py")))
            self.add(
                f"winner.json that names code, {form}",
                folder,
                "",
                "harness.tune",
                "space=run/winner.json",
                "dry_run=true",
            )

    def links(self) -> None:
        for kind, make in hostile_runs.LINKS.items():
            for module, words in (("harness.report", ["run=run"]), ("harness.tune", SMALL_RUN[2:])):
                run, folder = self.run()
                make(run, folder / "victim")
                self.add(f"{module}, {kind} is a link", folder, "is a link", module, *words)

    def files(self) -> None:
        for kind, make in hostile_runs.REFUSED_JSON.items():
            for name in ("trial.json", "run.json", "manifest.json", "verdict.json", "winner.json"):
                run, folder = self.run()
                manifest, trial = parts(run)
                make({"trial.json": trial, "manifest.json": manifest}.get(name, run.path / name))
                self.add(f"{name}, {kind}", folder, None, "harness.report", "run=run")
        for kind, make in hostile_runs.TABLES.items():
            for name in ("history.csv", "inference.csv", "inference_summary.csv"):
                run, folder = self.run()
                make(next(run.path.rglob(name)))
                self.add(f"{name}, {kind}", folder, None, "harness.report", "run=run")
        for kind, write in hostile_runs.ARRAYS.items():
            for name, module in (("reference.npy", "benchmarks"), ("mistakes.npy", "harness.report")):
                run, folder = self.run()
                manifest, _ = parts(run)
                write(manifest.parent / name, folder / "mark")
                hostile_runs.resealed(manifest, name)
                said = "run `python -m export` again" if module == "benchmarks" else None
                self.add(f"{name}, {kind}", folder, said, module, "run=run")


@pytest.fixture(scope="module")
def inputs(small_run, tmp_path_factory) -> Inputs:
    made = Inputs(tmp_path_factory.mktemp("inputs"), small_run[0])
    for make in (made.models, made.images, made.code, made.links, made.files):
        make()
    return made


@pytest.fixture(scope="module")
def watched(inputs, tmp_path_factory) -> Watched:
    if not is_possible():
        pytest.skip("strace is not installed, or not allowed")
    return watch(inputs.cases, tmp_path_factory.mktemp("watched"))


def test_each_answers_in_one_line(inputs, watched):
    wrong = []
    for name, said in inputs.said.items():
        code, error, seconds, _ = watched.answers[name]
        refused = code == 2 and error.startswith("error: ") and error.count("\n") == 1 and len(error) <= 301
        right = refused and (said or "") in error
        if (not right and not (said is None and code == 0 and error == "")) or seconds > 20:
            wrong.append((name, code, error[-300:], round(seconds, 1)))
    assert not wrong, "\n".join(map(str, wrong))
    assert len(inputs.said) >= 150


def test_nothing_is_written_outside(inputs, watched, tmp_path_factory):
    own = [str(tmp_path_factory.getbasetemp() / "watched"), "/dev/", "socket:", "pipe:", "/proc/self/"]
    wrong = []
    for case, call, paths in watched.written:
        works_on_it = inputs.said.get(case, "") is None or case.startswith("reference.npy")  # else it is refused before
        run = [str(inputs.cases[case][2] / "run") + "/"] if works_on_it else []
        wrong += [(case, call, path) for path in paths if not path.startswith((*own, *run))]
    assert not wrong, "\n".join(map(str, wrong))


def test_nothing_is_executed_and_nobody_called(inputs, watched):
    libraries = ("/sbin/ldconfig", "/usr/bin/uname", "/usr/bin/fc-list")  # what they search: functions, CPUs, fonts
    allowed = ("harness.data.decoder", "export.server", *(f'"{one}"' for one in libraries))
    executed = [one for one in watched.executed if one[0] != "start" and not any(name in one[1] for name in allowed)]
    called = [one for one in watched.connected if one[0] != "start"]
    assert not executed + called, "\n".join(map(str, executed + called))
    assert not list(inputs.top.glob("*/mark"))
    assert {path.read_text() for path in inputs.top.glob("*/victim/*")} == {
        "manifest.json",
        "model.safetensors",
        "model_x.onnx",
        "thesis.tex",
    }


def test_memory(watched):
    """1 GiB for a command is 400 MiB for a case: PyTorch and onnxruntime take the rest when they are imported."""
    assert not {name: answer[3] >> 20 for name, answer in watched.answers.items() if answer[3] >= 400 << 20}
    assert watched.children < 4 << 30  # the limit of a process that serves ONNX


def test_the_watch_sees_what_it_must(tmp_path):
    """The control: a network that the user names writes a file, starts a process and calls somebody."""
    if not is_possible():
        pytest.skip("strace is not installed, or not allowed")
    (tmp_path / "net.py").write_text(
        "import os, socket, subprocess\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'mark')!r}).touch()\nsubprocess.run(['true'])\n"
        "with socket.create_server(('127.0.0.1', 0)) as one:\n    socket.create_connection(one.getsockname()).close()\n"
        "from architectures.baseline import build\n"
    )
    words = ["space=quick", "dry_run=true", f"trial.architecture={tmp_path}/net.py"]
    found = watch({"control": ("harness.tune", words, tmp_path)}, tmp_path / "watched")
    assert found.answers["control"][:2] == (0, ""), found.answers
    assert any(str(tmp_path / "mark") in paths for _, _, paths in found.written)
    assert any('"true"' in one for case, one in found.executed if case == "control")
    assert any("127.0.0.1" in one for case, one in found.connected if case == "control")
