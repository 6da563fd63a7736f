"""Folders and files of the user's beside this project's packages: they work, or are refused before anything starts."""

import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import SMALL_RUN, SMALL_SPACE, TOP, command, records

from harness.__main__ import VERBS
from harness.config import BadInput, plugins
from harness.config.plugins import load
from harness.run.provenance import code_digest

CONSOLE = Path(sys.executable).parent / "classifier-harness"


def console(*arguments: str, cwd: Path, program: Path = CONSOLE) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


def test_verbs():
    listed = console("--help", cwd=TOP)
    assert listed.returncode == 0
    assert all(f"    {verb} " in listed.stdout for verb in VERBS)
    wrong = console("tun", "space=quick", cwd=TOP)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        f"error: tun: unknown; did you mean tune? choose one of {', '.join(VERBS)}\n",
    )


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_the_keys_of_its_command(verb):
    module = VERBS[verb].removesuffix(".__main__")
    assert console(verb, "--help", cwd=TOP).stdout == command("-m", module, "--help", cwd=TOP).stdout


@pytest.mark.parametrize("name", ["export", "benchmarks.py", "architectures/__init__.py"])
def test_a_folder_that_hides_a_package_is_refused_at_once(name, tmp_path):
    place = tmp_path / name
    if place.suffix:
        place.parent.mkdir(exist_ok=True)
        place.touch()
    else:
        place.mkdir()
    done = command("-m", "harness.tune", "space=quick", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name.split('/')[0].removesuffix('.py')}: {tmp_path}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_functions_for_python_check_it_too(tmp_path):
    (tmp_path / "export.py").touch()
    done = command("-c", "import harness; harness.tune('quick', run='run')", cwd=tmp_path)
    assert f"BadInput: export: {tmp_path / 'export.py'} hides this project's package" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_console_command_looks_into_no_folder(tmp_path):
    """All stages, beside folders and files of the user's that have the names of this project's packages."""
    for name in plugins.PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    arguments = SMALL_RUN[2:]
    done = console("tune", *arguments, "resources.cpus_per_trial=1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {r.status for r in records(tmp_path / "run")} == {"finished"}


@pytest.mark.slow
def test_the_wheel(tmp_path):
    """Built, installed beside this environment's dependencies, and used where no checkout is."""
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "results", "__pycache__")
    shutil.copytree(TOP, tmp_path / "tree", ignore=ignored)
    built = ["wheel", "--no-deps", "-q", "-w", str(tmp_path), str(tmp_path / "tree")]
    subprocess.run([sys.executable, "-m", "pip", *built], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("classifier_harness-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, capture_output=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not (site / package.name).exists() and not re.match("classifier|__editable__", package.name):
            (site / package.name).symlink_to(package)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "export").mkdir(parents=True)
    (elsewhere / "space.py").write_text(SMALL_SPACE.read_text() + "import layers\n")
    (elsewhere / "layers.py").touch()
    program = tmp_path / "venv" / "bin" / "classifier-harness"
    for space in ("quick", "space.py"):
        done = console("tune", f"space={space}", "dry_run=true", cwd=elsewhere, program=program)
        assert done.returncode == 0, done.stderr
        assert "images/s" in done.stdout
    arguments = ["space=space.py", "search.samples=1", "stages=[search,report]", "run=run", *SMALL_RUN[4:]]
    done = console("tune", *arguments, cwd=elsewhere, program=program)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = records(elsewhere / "run")
    assert record.environment.code == code_digest(record.config["architecture"])  # the same as of this checkout
    code = "import harness; print(harness.__file__)"
    found = subprocess.run([python, "-c", code], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(site))


def test_a_space_imports_its_neighbour(tmp_path):
    (tmp_path / "rates.py").write_text("RATES = [0.1, 0.2]\n")
    (tmp_path / "space.py").write_text(
        "from rates import RATES\n"
        "from tune_spaces import Choice, Space\n"
        "SPACE = Space(trial={'architecture': 'baseline'}, parameters={'optimizer.lr': Choice(RATES)})\n"
    )
    assert load("tune_spaces", str(tmp_path / "space.py"), "SPACE").parameters["optimizer.lr"].values == [0.1, 0.2]


def test_two_files_may_have_neighbours_of_one_name(tmp_path):
    """Also where they are imported when the network is built."""
    builds = []
    for name, width in (("one", 8), ("other", 16)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "layers.py").write_text(f"WIDTH = {width}\n")
        (folder / "later.py").write_text(f"HEIGHT = {width}\n")
        (folder / "net.py").write_text(
            "from layers import WIDTH\n"
            "def build(num_classes):\n"
            "    from later import HEIGHT\n"
            "    return WIDTH, HEIGHT\n"
        )
        builds.append(load("architectures", str(folder / "net.py"), "build"))
    assert [build(10) for build in [*builds, *builds]] == [(8, 8), (16, 16)] * 2


def test_loading_removes_nothing_that_was_imported(tmp_path, monkeypatch):
    """Not the program that loads, nor its own neighbours, nor what is installed below the folder of the user's file."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shared_layers.py").write_text("class Layer:\n    pass\n")
    (tmp_path / "venv" / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "venv" / "lib")
    (tmp_path / "venv" / "lib" / "installed_here.py").touch()
    import installed_here  # noqa: F401
    import shared_layers

    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "script.py"))
    before = dict(sys.modules)
    (tmp_path / "net.py").write_text("from shared_layers import Layer\nbuild = lambda num_classes: Layer()\n")
    assert type(load("architectures", str(tmp_path / "net.py"), "build")(10)) is shared_layers.Layer
    assert {name: sys.modules.get(name) for name in before} == before


def test_a_module_of_the_same_name_from_elsewhere_is_restored(tmp_path, monkeypatch):
    other, own = tmp_path / "other", tmp_path / "own"
    for folder in (other, own):
        (folder / "blocks_of_both").mkdir(parents=True)
        (folder / "blocks_of_both" / "sizes.py").write_text(f"WHERE = {folder.name!r}\n")
        (folder / "module_of_both.py").write_text(f"WHERE = {folder.name!r}\n")
    monkeypatch.syspath_prepend(other)
    import blocks_of_both.sizes
    import module_of_both

    (own / "net.py").write_text(
        "import blocks_of_both.sizes as sizes, module_of_both\n"
        "def build(num_classes):\n"
        "    import blocks_of_both.sizes as later\n"
        "    return sizes.WHERE, module_of_both.WHERE, later.WHERE\n"
    )
    for _ in range(2):
        assert load("architectures", str(own / "net.py"), "build")(10) == ("own", "own", "own")
        assert sys.modules["module_of_both"] is module_of_both
        assert sys.modules["blocks_of_both.sizes"] is blocks_of_both.sizes


def test_methods_import_neighbours_and_pickle_finds_their_classes(tmp_path):
    (tmp_path / "late_blocks.py").write_text("class Block:\n    pass\n")
    (tmp_path / "net.py").write_text(
        "from late_blocks import Block\n"
        "class Net:\n"
        "    def __init__(self, num_classes):\n"
        "        self.block = Block()\n"
        "    def forward(self):\n"
        "        from later_blocks import SIZE\n"
        "        return SIZE\n"
        "build = Net\n"
    )
    (tmp_path / "later_blocks.py").write_text("SIZE = 3\n")
    net = load("architectures", str(tmp_path / "net.py"), "build")(10)
    assert net.forward() == 3
    assert type(pickle.loads(pickle.dumps(net)).block) is type(net.block)


def test_functions_of_a_users_file_compile_once(tmp_path, monkeypatch):
    """What `forward` calls is the user's own function, which torch.compile can trace."""
    import torch

    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def twice(x):\n"
        "    return 2 * x\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return twice(x)\n"
        "def build(num_classes):\n"
        "    return Net()\n"
    )
    net = load("architectures", str(tmp_path / "net.py"), "build")(10)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=count, fullgraph=True)
    for _ in range(3):
        assert compiled(torch.ones(2)).tolist() == [2, 2]
        monkeypatch.setitem(sys.modules, f"another_module_{len(sys.modules)}", sys)
    assert len(graphs) == 1


@pytest.mark.slow
def test_workers_import_from_where_the_command_does(tmp_path):
    """A network that imports from the current folder, as `python -m` does."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "sizes.py").write_text("HIDDEN = [8]\n")
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "net.py").write_text(
        "from architectures import baseline\n"
        "from library.sizes import HIDDEN\n"
        "def build(num_classes, input_size=32):\n"
        "    return baseline.build(num_classes, input_size=input_size)\n"
    )
    arguments = [*SMALL_RUN, "trial.architecture=nets/net.py", "search.samples=1", "stages=[search]"]
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record.status for record in records(tmp_path / "run")] == ["finished"]


def test_a_neighbour_with_the_name_of_a_package_is_refused(tmp_path):
    (tmp_path / "export.py").write_text("THIS = 'of the user'\n")
    (tmp_path / "net.py").write_text("import export\ndef build(num_classes):\n    return export.THIS\n")
    with pytest.raises(BadInput, match=r"imports export, which is this project's package and also its neighbour"):
        load("architectures", str(tmp_path / "net.py"), "build")
    (tmp_path / "net.py").write_text("def build(num_classes):\n    return 'no import'\n")
    assert load("architectures", str(tmp_path / "net.py"), "build")(10) == "no import"
