"""Model folders that somebody else wrote: `export.predict` answers with one line, within 20 s, and reads no other file.
Those that need more than a second are in `test_watched.py`."""

import sys
import time
from pathlib import Path

import pytest
from hostile_models import CLASSES, MANIFESTS, folder_of, model

from export.predict import main


def predicted(file: Path, monkeypatch, capsys, *more: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["predict", f"model={file}", f"image={file.parent}/image.png", *more])
    code = main()
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_good_model_answers(tmp_path, monkeypatch, capsys):
    file = folder_of(tmp_path / "m", "model.onnx", model().SerializeToString())
    code, out, err = predicted(file, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert out.split()[1] in CLASSES


def refused(file, said, monkeypatch, capsys):
    started = time.monotonic()
    code, out, err = predicted(file, monkeypatch, capsys)
    assert time.monotonic() - started < 20
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert err.startswith(f"error: model={str(file)[:20]}")
    assert len(err) <= 301
    assert said in err


@pytest.mark.parametrize(("changes", "said"), [one for one in MANIFESTS if "config" not in one[0]])
def test_a_manifest_of_other_content(changes, said, tmp_path, monkeypatch, capsys):
    file = folder_of(tmp_path / "m", "model.onnx", model().SerializeToString(), **changes)
    refused(file, said, monkeypatch, capsys)


def test_names_of_classes_are_shown_without_control_characters(tmp_path, monkeypatch, capsys):
    content = model().SerializeToString()
    file = folder_of(tmp_path / "m", "model.onnx", content, classes=["\x1b[31mred", "\x07bell\nline"])
    code, out, _ = predicted(file, monkeypatch, capsys)
    assert code == 0
    assert out.rstrip("\n").isprintable()
