"""Commands that read what an earlier stage has not made yet: exit code 2, one line that names the command to run."""

import importlib
import runpy
import shutil
import sys
import warnings

import pytest


@pytest.mark.parametrize(
    ("module", "missing", "said"),
    [
        ("export", "trials", "no trial has finished; train with harness.tune first"),
        ("harness.inspect", "trials", "no trial has finished; train one first"),
        ("benchmarks", "trials", "the winner is not exported; run `python -m export` first"),
        ("benchmarks", "exported", "the winner is not exported; run `python -m export` first"),
        ("benchmarks.noise", "exported", "nothing is exported; run `python -m export` first"),
    ],
)
def test_a_command_that_comes_too_early(module, missing, said, run, tmp_path, monkeypatch, capsys):
    shutil.rmtree(run.path / missing)
    more = [f"image={__file__}"] if "inspect" in module else []
    monkeypatch.setattr(sys, "argv", [module, f"run={run.path}", *more])
    warnings.simplefilter("ignore")  # the module is known already
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    code = ended.value.code
    line = capsys.readouterr().err
    assert (code, line.count("\n")) == (2, 1), line
    assert line.startswith(f"error: run={run.path}: ")
    assert said in line


def test_a_report_of_a_run_without_a_finished_trial(run, monkeypatch, capsys):
    for name in ("trials", "exported"):
        shutil.rmtree(run.path / name)
    monkeypatch.setattr(sys, "argv", ["harness.report", f"run={run.path}"])
    assert importlib.import_module("harness.report").main() == 0
    page = (run.path / "report" / "index.html").read_text()
    assert "no trial has finished" in page.lower() or "no trials" in page.lower()
