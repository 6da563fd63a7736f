"""Bad command lines, spaces, files and machines: exit code 2, one line of at most 300 characters that says what to do,
nothing written, before Ray starts. `tests/test_cli.py` has those of single keys; here are the kinds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP, command, one_error_line

from harness.config import Data
from harness.data.dataset import load_dataset

QUICK = "space=quick"
BASELINE = f"{QUICK} trial.architecture=baseline"
DEEP = "[" * 5000 + "]" * 5000

# Command line and what the error says. Each line is a mistake that somebody made, or a value that would hang.
COMMANDS = {
    # not finite, or absurd
    f"{QUICK} resources.gpus_per_trial=inf": "resources.gpus_per_trial=inf: input should be a finite number",
    f"{QUICK} resources.gpus_per_trial=nan": "finite number",
    f"{QUICK} resources.gpus_per_trial=1e-9": "at most 100 trials share a GPU",
    f"{QUICK} resources.cpus_per_trial=1e-9": "resources.cpus_per_trial=1e-9: input should be greater than or equal to",
    f"{QUICK} resources.cpus_per_trial=inf": "finite number",
    f"{QUICK} resources.timeout_seconds=inf": "finite number",
    f"{QUICK} resources.timeout_seconds=1e300": "less than or equal to",
    f"{QUICK} resources.checkpoint_gib=inf": "finite number",
    f"{QUICK} resources.concurrency=1000000000": "less than or equal to 10000",
    f"{QUICK} resources.retries=1000000000000": "less than or equal to 1000",
    f"{QUICK} search.time_budget_seconds=inf": "finite number",
    f"{QUICK} search.samples=1000000000 dry_run=true": "search.samples=1000000000: input should be less than",
    f"{QUICK} search.seeds=1000000000": "search.seeds=1000000000: input should be less than or equal to 1000",
    f"{QUICK} search.seed=99999999999999999999": "less than or equal to",
    f"{QUICK} search.confirm_seeds=1000000000": "less than or equal to 1000",
    f"{QUICK} search.confirm=1000000000": "less than or equal to",
    f"{QUICK} search.asha.reduction_factor=1e300": "less than or equal to",
    f"{QUICK} trial.optimizer.lr=1e300": "less than or equal to",
    f"{QUICK} trial.optimizer.weight_decay=inf": "finite number",
    f"{QUICK} trial.batch_size=99999999999": "less than or equal to",
    f"{QUICK} trial.batch_size=0": "trial.batch_size=0: input should be greater than or equal to 1",
    f"{QUICK} trial.epochs=99999999999": "less than or equal to",
    f"{QUICK} trial.checkpoint_seconds=inf": "finite number",
    f"{QUICK} trial.validations_per_epoch=99999999999": "less than or equal to",
    f"{BASELINE} trial.options.widths=[100000,100000,100000]": "GiB to train",
    f"{BASELINE} trial.options.widths=[0,8]": "widths=[0, 8]: give a list of integers above 0",
    f"{BASELINE} trial.options.widths=[]": "at least one convolution",
    f"{BASELINE} trial.options.hidden=[0]": "hidden=[0]: give a list of integers above 0",
    f"{BASELINE} trial.options.widths=[-8]": "give a list of integers above 0",
    f"{BASELINE} trial.options.widths=8": "widths=8: give a list of integers above 0",
    f"{BASELINE} trial.options.widths=[8.5]": "give a list of integers above 0",
    f"{BASELINE} trial.options.kernel_size=99": "kernel_size=99: larger than the image of 32 pixels",
    f"{BASELINE} trial.options.dropout=2": "dropout",
    f"{QUICK} data.size=1000000": "less than or equal to 4096",
    f"{QUICK} data.validation=1": "less than 1",
    f"{QUICK} benchmark.threads=100000": "less than or equal to 512",
    f"{QUICK} benchmark.round_seconds=inf": "finite number",
    f"{QUICK} benchmark.latency_ms=inf": "finite number",
    f"{QUICK} benchmark.batch_sizes=[1000000000]": "less than or equal to",
    f"{QUICK} benchmark.rounds=1000000000": "less than or equal to",
    f"{QUICK} benchmark.replicates=1000000000": "less than or equal to",
    f"{QUICK} export.opset=99": "less than or equal to",
    f"{QUICK} export.max_accuracy_drop=nan": "export.max_accuracy_drop=nan: ",
    f"{BASELINE} trial.options.dropout=Infinity": "dropout=inf: give finite numbers, text",
    f"{BASELINE} trial.options.dropout=NaN": "dropout=nan: give finite numbers, text",
    f"{BASELINE} trial.options.dropout=1e999": "dropout=inf: give finite numbers, text",
    f"{BASELINE} trial.options.widths=[8,NaN]": "give finite numbers, text",
    # the grammar
    f"{QUICK} trial.options=x trial.options.widths=[8]": "trial.options=x: holds several values",
    f"{QUICK} trial.options=x": "trial.options=x: holds several values",
    f"{QUICK} trial.options.x={DEEP}": "nested too deeply",
    f"{QUICK} =x": "not of the form key=value",
    f"{QUICK} stages=[reprot]": "did you mean report?",
    f"{QUICK} trial.optimizer.name=adamm": "did you mean adam",
    f"{QUICK} trial.presision=float32": "did you mean trial.precision?",
    f"{QUICK} trial.architecture=finall": "did you mean final?",
    f"{QUICK} data.name=digit": "did you mean digits?",
    f"{QUICK} search.variants=x": "search.variants=x: give a list: search.variants=[x]",
    f"{QUICK} trial.epochs=1.5": "valid integer",
    f"{QUICK} trial.augmentation.flip=maybe": "valid boolean",
    f"{QUICK} {'x' * 100_000}=1": "unknown key",
    f"{QUICK} trial.epochs={'9' * 100_000}": "trial.epochs=999",
    f"{QUICK} \x1b[31mred=1": r"\x1b[31mred=1: unknown key",
    f"{QUICK} run=a\x07b": "has control characters",
    f"{QUICK} run=a\x1b[31mb": "has control characters",
    f"{QUICK} run={'x' * 300}": "is too long; give names of at most 200 bytes",
    f"{QUICK} run=\udcff": "is not UTF-8",
    f"{QUICK} run=/proc/x/y": "run=/proc/x/y: ",
    f"{QUICK} run=/dev/null": "run=/dev/null: ",
    f"{QUICK} resources.address=ray://localhost:10001": "Ray Client is not supported",
    # files
    "space=nothing.py": "no such file",
    "space=.": "space=.: unknown",
    "space=/": "space=/: unknown",
    "space=fifo.py": "space=fifo.py: no such file",
    "space=dangling.py": "space=dangling.py: no such file",
    "space=latin.py": "space=latin.py: cannot be loaded",
    "space=exits.py": "space=exits.py: cannot be loaded: SystemExit",
    "space=fifo.json": "space=fifo.json: ",
    "space=text.json": "is no winner.json of a run",
    f"{QUICK} data.name=exits.py": "data.name=exits.py: cannot be loaded: SystemExit",
    f"{QUICK} data.name=own_exits.py": "data.name=own_exits.py: decode() raises SystemExit",
    f"{QUICK} data.name=own_raises.py": "decode() raises ZeroDivisionError",
    f"{QUICK} data.name=own_floats.py": "train images float64",
    f"{QUICK} data.name=own_lengths.py": "20 train images, 19 labels",
    f"{QUICK} data.name=own_labels.py": "train has the label 6; give labels from 0 to 1",
    f"{QUICK} data.name=own_none.py": "decode() returns a NoneType; return a Decoded",
    f"{QUICK} data.name=own_generator.py": "classes generator: give a tuple of names",
    f"{QUICK} data.name=own_half.py": "a class has a name that is not printable",
    f"{QUICK} data.name=own_long.py": "longer than 255 characters",
    f"{QUICK} data.name=own_triple.py": "returns what is no Decoded as described",
    f"{QUICK} data.name=own_empty.py": "no train images; give some",
    f"{QUICK} data.name=own_huge.py": "100,000,000,000 train images; give at most 1,000,000,000",
    f"{QUICK} trial.architecture=exits.py": "exits.py: cannot be loaded: SystemExit",
    f"{QUICK} data.name=images data.root=fifo.py": "data.root=",
    f"{QUICK} data.name=images data.root=text.json": "is a file; give a folder",
    f"{QUICK} data.name=images": "needs data.root=DIR",
    f"{QUICK} run=text.json": "exists and is not a run directory",
    f"{QUICK} run=text.json/x": "is not a folder",
    # spaces
    "space=choice.py": "parameters epochs=-1: input should be greater than or equal to 1",
    "space=bounds.py": "parameters optimizer.lr=0.0: input should be greater than 0",
    "space=grid.py search.algorithm=grid dry_run=true data.name=digits": "search.algorithm=grid: 1,000,000,000 comb",
    "space=infinite.py": "Uniform(0, inf): low must be less than high, both finite",
    "space=no_list.py": "Choice(3): give a list of values",
    "space=domain.py": "parameters epochs=3: give a Uniform, LogUniform, Integer or Choice",
    "space=object.py": "give finite numbers, text, or lists of these",
    "space=nan.py": "Choice: nan: give finite numbers",
    "space=half.py": "give names of 1 to 200 printable characters",
    "space=unnamed.py": "variants: '': give names of 1 to 200 printable characters",
    "space=long.py": "give names of 1 to 200 printable characters",
    "space=inf.py": "dropout=inf: give finite numbers, text",
    "space=bytes.py": "activation=b'relu': give finite numbers, text",
    "space=interrupts.py": "KeyboardInterrupt()",
    "space=generator.py": "GeneratorExit()",
    "space=base.py": "BaseException",
    "space=network.py": "trial.architecture=resnet: unknown",
}

OWN = """
import sys
import numpy as np
from harness.data.dataset import Decoded
images, labels = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 2
images[:, 0, 0, 0] = np.arange(20)
def identity(data):
    return "{name}"
def decode(data, progress):
    {body}
"""
FILES = {
    "latin.py": "name = '\xe9'\n".encode("latin-1"),
    "exits.py": "import sys\nsys.exit(0)\n",
    "text.json": "hello",
    "own_exits.py": "sys.exit(0)",
    "own_raises.py": "1 / 0",
    "own_floats.py": "return Decoded(('a', 'b'), (images / 255, labels), None)",
    "own_lengths.py": "return Decoded(('a', 'b'), (images, labels[:-1]), None)",
    "own_labels.py": "return Decoded(('a', 'b'), (images, labels + 6), None)",
    "own_none.py": "pass",
    "own_generator.py": "return Decoded((name for name in 'ab'), (images, labels), None)",
    "own_half.py": "return Decoded(('\\ud800', 'b'), (images, labels), None)",
    "own_long.py": "return Decoded(('a' * 300, 'b'), (images, labels), None)",
    "own_triple.py": "return Decoded(('a', 'b'), (images, labels, 3), None)",
    "own_empty.py": "return Decoded(('a', 'b'), None, None)",
    "own_huge.py": "n = 10**11; return Decoded(('a', 'b'), (np.broadcast_to(images[:1], (n, 8, 8, 3)), "
    "np.broadcast_to(labels[:1], (n,))), None)",
    "domain.py": "Space({}, parameters={'epochs': 3})",
    "object.py": "Space({}, parameters={'epochs': Choice([object()])})",
    "nan.py": "Space({}, parameters={'optimizer.lr': Choice([float('nan')])})",
    "half.py": "Space({}, variants={'\\ud800': {}, 'b': {}})",
    "unnamed.py": "Space({}, variants={'': {}, 'b': {}})",
    "long.py": "Space({}, variants={'a' * 300: {}, 'b': {}})",
    "inf.py": "Space({'architecture': 'baseline', 'options.dropout': float('inf')})",
    "bytes.py": "Space({'architecture': 'baseline', 'options.activation': b'relu'})",
    "interrupts.py": "raise KeyboardInterrupt",
    "generator.py": "raise GeneratorExit",
    "base.py": "raise BaseException('x')",
    "choice.py": "Space({}, parameters={'epochs': Choice([1] * 200 + [-1])})",
    "bounds.py": "Space({}, parameters={'optimizer.lr': Uniform(0.0, 0.1)})",
    "grid.py": "Space({}, parameters={'epochs': Integer(1, 1000), 'batch_size': Integer(1, 10**6)})",
    "infinite.py": "Space({}, parameters={'optimizer.lr': Uniform(0, float('inf'))})",
    "no_list.py": "Space({}, parameters={'optimizer.lr': Choice(3)})",
    "network.py": "Space({}, parameters={'architecture': Choice(['final', 'resnet'])})",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, own_cache):
    load_dataset(Data(name="digits"))  # decoded before, so that it is not new in the cache
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        if name.startswith("own_"):
            text = OWN.format(name=name, body=text)
        if str(text).startswith("Space("):
            text = f"from tune_spaces import Choice, Integer, Space, Uniform\nSPACE = {text}\n"
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name in ("fifo.py", "fifo.json"):
        os.mkfifo(folder / name)
    (folder / "dangling.py").symlink_to("/no/where.py")
    return folder


def tree(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda text: text[:60].encode(errors="backslashreplace").decode())
def test_bad_input_is_one_short_line_and_leaves_nothing(arguments, files, own_cache, monkeypatch, capsys):
    monkeypatch.chdir(files)
    before, cached = tree(files), tree(own_cache)
    assert COMMANDS[arguments] in one_error_line(arguments.split(" "), monkeypatch, capsys)
    assert tree(files) == before
    assert {path for path in tree(own_cache) - cached if "datasets" in path and ".checked" not in path} == set()


def as_user(number: int, *words: str, cwd: Path, home: bool = False, **environment: str):
    """Run as another user id, without an account and without a home."""
    own = {name: value for name, value in os.environ.items() if home or name != "HOME"}
    return subprocess.run(
        ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups", sys.executable, *words],
        env={**own, **environment, "PYTHONPATH": str(TOP)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def place(tmp_path):
    """A folder that every user may write to; skipped where another user cannot start this Python and this project."""
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o777)
    try:
        code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import harness.tune'], check=True)"
        started = as_user(12345, "-c", code, cwd=place).returncode == 0
    except OSError:
        started = False
    if not started:
        pytest.skip("another user cannot start this Python, or not read this project")
    return place


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


@as_root
@pytest.mark.slow
def test_a_user_without_home_and_account(place):
    """A clear line without a cache; with one, everything works."""
    done = as_user(12345, "-m", "harness.tune", QUICK, cwd=place, HARNESS_CACHE="")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "HARNESS_CACHE=: this user has no home directory; set it" in done.stderr
    words = ("-m", "harness.tune", QUICK, "search.samples=1", "trial.epochs=1", "stages=[search,report]")
    done = as_user(12345, *words, cwd=place, HARNESS_CACHE=str(place / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr


@as_root
def test_a_folder_that_is_not_writable(place):
    (place / "locked").mkdir(mode=0o555)
    cache = {"HARNESS_CACHE": str(place / "cache")}
    done = as_user(12345, "-m", "harness.tune", QUICK, f"run={place}/locked/run", cwd=place, **cache)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"run={place}/locked/run: {place}/locked is not writable" in done.stderr
    done = as_user(12345, "-m", "harness.tune", QUICK, cwd=place, HARNESS_CACHE=str(place / "locked"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "HARNESS_CACHE=" in done.stderr


def test_a_cache_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    done = command("-m", "harness.tune", QUICK, cwd=tmp_path, HARNESS_CACHE=str(tmp_path / "file"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert re.search(r"HARNESS_CACHE=.*file is not a folder", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
