"""The grammar of the command line, its help and its errors."""

import importlib
import re
import runpy
import sys
import time
import warnings

import pytest
from conftest import TOP, command, here, one_error_line

from harness.config import BadInput, Tune, command_line
from harness.config.errors import raised_at
from harness.config.keys import build_config, keys, nested, read_values

COMMANDS = ["harness.tune", "harness.report", "export", "export.predict", "benchmarks", "architectures"]


def read(*arguments: str) -> dict:
    return read_values(command_line.split_arguments(list(arguments)), Tune)


def test_values_are_read_by_their_type():
    values = read(
        "space=final",
        "run=a=b, [c] é",
        "stages=[search,report]",
        "trial.options.kernel_size=5",
        "trial.options.widths=[[8,16],[32,32]]",
        "trial.options.frozen=[conv1, bn1]",
        "trial.options.activation=relu",
        "trial.options.batch_norm=none",
        "trial.options.nothing=null",
        "trial.options.on=True",
        "trial.gradient_clip=none",
        "trial.augmentation.flip=true",
        "trial.optimizer.lr=5e-4",
        "search.variants=[a, b]",
    )
    config = build_config(Tune, nested(values))
    assert config.run is not None
    assert config.run.name == "a=b, [c] é"
    assert config.stages == ["search", "report"]
    assert config.trial.options == {
        "kernel_size": 5,
        "widths": [[8, 16], [32, 32]],
        "frozen": ["conv1", "bn1"],
        "activation": "relu",
        "batch_norm": "none",
        "nothing": None,
        "on": True,
    }
    assert config.trial.gradient_clip is None
    assert config.trial.augmentation.flip is True
    assert config.trial.optimizer.lr == 5e-4
    assert config.search.variants == ["a", "b"]


BAD = {
    "space=finl": r"space=finl: unknown; did you mean final\? choose one of annealed, baseline, final",
    "space=quick trial.optimizer.lr=-1": r"trial\.optimizer\.lr=-1: input should be greater than 0",
    "space=quick trial.optimizer.lr=nan": r"trial\.optimizer\.lr=nan: input should be a finite number",
    "space=quick trial.optimizer.lr=abc": r"trial\.optimizer\.lr=abc: input should be a valid number",
    "space=quick trial.optimiser.lr=1": r"trial\.optimiser\.lr=1: unknown key; did you mean trial\.optimizer\.lr\?",
    "space=quick trial.epochs=0": r"trial\.epochs=0: input should be greater than or equal to 1",
    "space=quick trial.epochs=": r"trial\.epochs=: the value is empty",
    "space=quick trial.epochs": r"trial\.epochs: not of the form key=value",
    "space=quick trial.epochs=1 trial.epochs=2": r"trial\.epochs=2: trial\.epochs is given twice",
    "trial.epochs=1": r"space=: is missing; give space=NAME",
    "space=quick trial.optimizer.name=sdg": r"trial\.optimizer\.name=sdg: input should be 'sgd', 'adam' or 'adamw'",
    "space=quick trial.optimizer.nesterov=true": r"nesterov needs optimizer\.name=sgd",
    "space=quick trial.normalization.std=[0,1,1]": r"trial\.normalization\.std=.*above 0",
    "space=quick stages=[serch]": r"stages\.0=serch: input should be 'search'",
    "space=quick trial.architecture=resnet": r"trial\.architecture=resnet: unknown; choose one of baseline",
    "space=quick trial.architecture=/no/net.py": r"trial\.architecture=/no/net\.py: no such file",
    "space=quick trial.options.colour=1": r"trial\.options\.colour=1: final has no such option; choose from widths",
    "space=/no/space.py": r"space=/no/space\.py: no such file",
    "space=quick data.name=cifar": r"data\.name=cifar: unknown; did you mean cifar10\?",
    "space=quick data.name=images data.root=/no/folder": r"data\.root=/no/folder: no such folder",
    "space=quick resources.gpus_per_trial=64": r"resources\.gpus_per_trial=64: a trial uses one GPU; give 1",
    "space=quick resources.gpus_per_trial=1": r"resources\.gpus_per_trial=1: PyTorch sees 0 GPUs here",
    "space=quick benchmark.device=cuda": r"benchmark\.device=cuda: PyTorch sees no GPU",
    "space=quick benchmark.scope=device benchmark.latency_ms=5": r"latency_ms=5: single images arrive at the host",
    "space=quick benchmark.scope=both": r"benchmark\.scope=both: PyTorch sees no GPU",
    "space=quick trial.compile=captured-eager": r"trial\.compile=captured-eager: needs a CUDA device",
    "space=quick trial.precision=float16": r"trial\.precision=float16: needs a CUDA device",
    "space=quick trial.batch_size=5000": r"trial\.batch_size=5000: more than the \d+ training images",
    "space=quick search.scheduler=asha search.asha.grace_epochs=5": r"search\.asha\.grace_epochs=5: must be less than",
    "space=quick search.algorithm=grid": r"a grid needs Choice or Integer",
    "space=quick search.variants=[a]": r"search\.variants=\[a\]: the space's variants are: none, it is a search",
    "space=published search.variants=[basline]": r"search\.variants=\[basline\]: the space's variants are: baseline",
    "space=published trial.optimizer.lr=0.1": r"trial\.optimizer\.lr=0\.1: the variants .* change it",
    "space=quick benchmark.runtimes=[tensorflow]": r"benchmark\.runtimes=tensorflow: unknown",
    "space=quick resources.gpus_per_trial=1.5": r"resources\.gpus_per_trial=1\.5: a trial uses one GPU",
    "space=quick resources.cpus_per_trial=1000": r"resources\.cpus_per_trial=1000: ",
    "space=annealed data.name=digits search.seeds=some": r"search\.seeds=some: input should be a valid integer",
    "space=annealed data.name=digits search.scheduler=asha": r"search\.scheduler=asha: would stop seeds of a variant",
    "space=quick search.metric=f1": r"search\.metric=f1: input should be 'val_accuracy' or 'val_loss'",
    "space=quick search.mode=maximum": r"search\.mode=maximum: unknown key",
    "space=quick search.scheduler=hyperband": r"search\.scheduler=hyperband: input should be 'fifo' or 'asha'",
    "space=quick search.samples=0": r"search\.samples=0: input should be greater than or equal to 1",
    "space=quick search.seed=1.5": r"search\.seed=1\.5: input should be a valid integer",
    "space=quick search.variants=[]": r"search\.variants=\[\]: the space's variants are: none, it is a search",
    "space=quick trial._target_=os.system": r"trial\._target_=os\.system: unknown key",
    "space=quick trial.epochs=${oc.env:HOME}": r"trial\.epochs=\$\{oc\.env:HOME\}: input should be a valid integer",
    "space=quick trial.epochs=!!python/name:os.system": r"trial\.epochs=!!python/name:os\.system: input should be",
    "space=quick trial.options.x=!!python/name:os.system": r"options\.x=!!python.*: final has no such option",
    "space=quick trial.options.widths=${trial.options.widths}": r"widths=\$\{trial\.options\.widths\}: give a list",
    "space=quick benchmark.device=cuda:0": r"benchmark\.device=cuda:0: input should be 'auto', 'cpu' or 'cuda'",
    "space=quick export.formats=[tflite]": r"export\.formats\.0=tflite: input should be 'onnx'",
    "space=quick export.formats=[]": r"export\.formats=\[\]: has 0 values; give at least 1",
    "space=quick data.classes=[7]": r"data\.classes=\['7'\]: has 1 values; give at least 2",
    "space=quick trial.schedule.name=cosin": r"trial\.schedule\.name=cosin: .*did you mean cosine\?",
    "space=quick data.classes=[7,x]": r"data\.classes=x: no such class; choose from 0, 1, 2",
    "space=quick stages=search": r"stages=search: give a list: stages=\[search\]",
    "space=quick trial.schedule.warmup_epochs=50": r"warmup_epochs=50: the learning rate would never reach",
    "space=quick data.validation=0.9999": r"too few to hold out \d+ .*a smaller data\.validation",
    "space=quick trust=maybe": r"trust=maybe: input should be a valid boolean",
    "space=/no/winner.json": r"space=/no/winner\.json: does not exist; give one that harness\.tune has written",
}


@pytest.mark.parametrize("arguments", BAD, ids=lambda text: text)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = one_error_line(arguments.split(), monkeypatch, capsys)
    assert re.search(BAD[arguments], line), line
    assert list(tmp_path.iterdir()) == []


def test_broken_space_file_is_told_apart_from_the_command(tmp_path):
    from harness.search.resolution import resolve

    space = tmp_path / "mine.py"
    for text, message in (
        ("1 +", "cannot be loaded: SyntaxError"),
        ("x = 1", "has no `SPACE`"),
        ("SPACE = 3", "SPACE is a int"),
        ("from tune_spaces import Space\nSPACE = Space({'epochs': 0})", r"mine\.py: trial\.epochs=0: input should"),
        (
            "from tune_spaces import Space\nSPACE = Space({'epoch': 1})",
            r"mine\.py: trial\.epoch=1: unknown key; did you mean",
        ),
    ):
        space.write_text(text)
        with pytest.raises(BadInput, match=message):
            resolve({"space": str(space)})


def test_run_directory_of_something_else_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["harness.tune", "space=quick", "run=thesis"])
    assert importlib.import_module("harness.tune").main() == 2
    assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["harness.report", "export", "benchmarks"])
def test_stage_commands_want_a_run_directory(module, tmp_path):
    done = here(module, f"run={tmp_path}/none", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no run directory" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_fast_and_imports_nothing_heavy(module, tmp_path):
    seconds = []
    for _ in range(3):  # the fastest: other work on the machine only adds
        started = time.perf_counter()
        done = command("-X", "importtime", "-m", module, "--help", cwd=TOP)
        seconds.append(time.perf_counter() - started)
    assert done.returncode == 0
    assert done.stdout.startswith(f"python -m {module} ")
    assert "key=value" in done.stdout
    assert min(seconds) < 1.5
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "onnxruntime", "seaborn", "pandas"}


@pytest.mark.parametrize("module", COMMANDS)
def test_version(module):
    from harness import __version__

    assert command("-m", module, "--version", cwd=TOP).stdout == f"harness {__version__}\n"


def test_help_lists_every_key_and_choice():
    text = command_line.help_text("doc", Tune)
    assert all(key.name in text for key in keys(Tune))
    assert "one of baseline, final, model1, model2, transfer" in text
    assert "one of cifar10, digits, images" in text


def test_debug_shows_the_traceback(tmp_path):
    done = command("-m", "harness.tune", "space=finl", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_architectures_command(tmp_path):
    listed = here("architectures", cwd=tmp_path).stdout
    assert "390,410" in listed
    assert "6,382,090" in listed
    shown = here("architectures", "final", "kernel_size=5", "num_classes=7", cwd=tmp_path).stdout
    assert "128 x 16 x 16" in shown
    assert "multiply-adds" in shown
    wrong = here("architectures", "finl", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")


@pytest.mark.parametrize("module", ["evidence", "training", "soak", "plans", "kills", "noise"])
def test_a_place_for_results_that_cannot_be_written(module, tmp_path, monkeypatch, capsys):
    """Found before any work."""
    (tmp_path / "x.csv").mkdir()
    warnings.simplefilter("ignore")  # the module may be known already
    for out, said in (("/proc/x.csv", "cannot be written to"), (f"{tmp_path}/x.csv", "is a folder; give a file")):
        if module in ("training", "soak") and "folder" in said:
            continue
        monkeypatch.setattr(sys, "argv", [module, f"out={out}", *(["run=x"] if module == "noise" else [])])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(f"benchmarks.{module}", run_name="__main__")
        assert ended.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: out={out}: ")
        assert said in line


@pytest.mark.parametrize(
    "words",
    ["baseline dropout=NaN", "baseline input_size=2", "baseline input_size=99999999", "baseline num_classes=1", "finl"],
)
def test_networks_that_cannot_be_shown(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["architectures", *words.split()])
    assert importlib.import_module("architectures.__main__").main() == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", ["architecture=finall data.name=digits", "data.name=images data.root=/no/where"])
def test_a_benchmark_of_bad_input_leaves_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks.training", *words.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.training", run_name="__main__")
    assert ended.value.code == 2
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["exit()", "json.loads('x')", "torch.zeros(2) @ torch.zeros(3)"])
def test_the_place_of_an_error_is_the_users(text, tmp_path):
    """Not where Python or a package raises it, nor where this project called."""
    (tmp_path / "own.py").write_text(f"import json, torch\n{text}\n")
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        runpy.run_path(str(tmp_path / "own.py"))
    assert raised_at(raised.value) == f" at {tmp_path}/own.py:2: {text}"
    with pytest.raises(BadInput) as raised:
        command_line.split_arguments(["x"])
    assert "harness" not in raised_at(raised.value)
