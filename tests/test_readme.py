"""What README and docs say is true: their commands are accepted, their files are there."""

import importlib
import re
import shlex
import shutil
import signal
import sys

import pytest
from conftest import TOP, command

README, EXTENDING = (TOP / "README.md").read_text(), (TOP / "docs" / "extending.md").read_text()
ARCHITECTURE = (TOP / "docs" / "architecture.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", (TOP / "docs" / "commands.md").read_text(), re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.startswith("python -m ")]
KNOWN = {
    *("harness.tune", "harness.report", "harness.inspect", "export", "export.predict", "architectures", "pytest"),
    *("benchmarks", "benchmarks.evidence", "benchmarks.noise", "benchmarks.training"),
}


def test_there_are_commands():
    assert len(LINES) >= 8
    assert {shlex.split(line)[2] for line in LINES} == KNOWN


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of class folders to stand for DIR."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(100):
            Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


# Benchmarks take over 10 s: each arm has processes of its own.
COMMANDS = [
    pytest.param(line, marks=[pytest.mark.slow] if line.startswith("python -m benchmarks") else [])
    for line in LINES
    if "pytest" not in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line, images, small_run, tmp_path, monkeypatch, capsys):
    """Training commands are checked by a dry run, which takes every step up to the first trial; others run."""
    run = tmp_path / "run"
    shutil.copytree(small_run[0], run)
    words = shlex.split(line.split("  #")[0])
    words = [w.replace("=DIR", f"={images}").replace("=RUN", f"={run}") for w in words]
    model = next(run.glob("exported/*/model.onnx"))
    words = [w.replace("=MODEL", f"={model}").replace("=IMAGE", f"={images}/cat/0.png") for w in words]
    if words[2] == "harness.tune" and "dry_run=true" not in words:
        words.append("dry_run=true")
    if "benchmarks" in words:
        words = [w for w in words if not w.startswith(("benchmark.batch_sizes=", "benchmark.replicates="))]
        words += ["benchmark.batch_sizes=[1]", "benchmark.replicates=2", "benchmark.runtimes=[onnxruntime]"]
    if "benchmarks.noise" in words:
        words += ["sittings=2", "replicates=2", "rounds=1", "round_seconds=0.01"]
    if "benchmarks.evidence" in words:
        words += ["simulations=10"]
    if "benchmarks.training" in words:
        words += ["arms=[plain]", "rounds=2", "trials=1", "epochs=1"]
    if any(w.endswith("net.py") or w.endswith("space.py") for w in words):
        (tmp_path / "net.py").write_text((TOP / "architectures" / "baseline.py").read_text())
        (tmp_path / "space.py").write_text((TOP / "tune_spaces" / "quick.py").read_text())
    if words[2].startswith("benchmarks"):
        done = command(*words[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return
    module = importlib.import_module(words[2] if "." in words[2] else f"{words[2]}.__main__")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay
    assert module.main() == 0, capsys.readouterr().err


def test_the_readme_is_one_screen():
    assert len(README.splitlines()) <= 70


def test_file_tree_is_true():
    tree = ARCHITECTURE.split("```text\n")[2].split("```")[0]
    paths = [line.split("  ")[0].strip() for line in tree.splitlines()]
    assert len(paths) > 10
    for path in paths:
        assert (TOP / path).exists(), path


def test_every_decision_has_a_place():
    """The files and functions that docs/architecture.md names are there."""
    table = ARCHITECTURE.split("## Where each decision lives")[1].split("## Folders")[0]
    files = re.findall(r"`([\w/]+\.py)`", table)
    assert len(files) > 20
    sources = {file: (TOP / file).read_text() for file in files}
    names = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", table) if not name.endswith(".py")}
    for name in names:
        assert any(re.search(rf"(def|class) {name}\b|^{name} =", text, re.MULTILINE) for text in sources.values()), name


@pytest.mark.parametrize(
    "page",
    [*TOP.glob("*.md"), TOP / "benchmarks" / "results" / "README.md", *sorted((TOP / "docs").glob("*.md"))],
    ids=lambda page: str(page.relative_to(TOP)),
)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("https://"):
            file, _, heading = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), target
            assert not heading or heading in anchors(linked), target


def anchors(page):
    """The names by which links reach a page's headings: in lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("heading", ["An architecture", "A space", "A data set", "A runtime"])
def test_how_to_add_something_is_told(heading):
    assert f"## {heading}" in EXTENDING


@pytest.mark.slow
def test_the_ablation_shown_gets_its_report(tmp_path):
    """As it stands, but for its size and its data; it has at most 15 lines."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", EXTENDING, re.DOTALL) if "Claim(" in b]
    assert len(block.splitlines()) <= 15
    (tmp_path / "space.py").write_text(block)
    small = [
        "trial.options.widths=[[4,8],[8,8]]",
        "trial.options.hidden=[8]",
        "trial.compile=off",
        "trial.batch_size=16",
    ]
    arguments = ["-m", "harness.tune", "space=space.py", "run=run", "stages=[search,confirm,report]", *small]
    arguments += ["data.name=digits", "data.limit=20", "trial.epochs=2", "search.seeds=2"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    claims = re.findall(r'Claim\("([^"]+)"', block)
    assert len(claims) == 3
    for claim in claims:
        assert re.search(rf"{claim}: [+-][0-9.]+ \[.*\] points.* over 2 seeds, (holds|does not hold|not settled)", page)
    figures = {path.stem for path in (tmp_path / "run" / "report" / "figures").glob("*.png")}
    assert {"effects", "variants", "gap", "claim_1_losses", "claim_2_losses", "claim_3_losses"} <= figures
