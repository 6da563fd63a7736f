"""CSV files: cells that a spreadsheet would execute, permissions, and tables that are none of ours."""

import pytest
from conftest import TOP, command

from harness.config import BadInput
from harness.run.tables import csv_text


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+1+1", "'+1+1"),
        ("-cmd", "'-cmd"),
        ("\t=1", "'\t=1"),
        ("-1.5", "-1.5"),
        ("+3", "+3"),
        (-2.5, "-2.5"),
        ("a=b", "a=b"),
    ],
)
def test_no_cell_is_a_formula(value, written):
    assert csv_text(["x"], [{"x": value}]) == f"x\n{written}\n"


def test_files_follow_the_umask(tmp_path):
    code = "import os; os.umask(0o077); from pathlib import Path; from harness.run import storage; "
    code += "storage.write_atomically(Path('a.json'), 'x'); print(oct(os.stat('a.json').st_mode & 0o777))"
    assert command("-c", code, cwd=tmp_path, PYTHONPATH=str(TOP)).stdout == "0o600\n"


def test_checkpoints_are_private(tmp_path):
    import torch

    from harness.run.checkpoints import save_checkpoint

    save_checkpoint(tmp_path, 1, {"x": torch.zeros(2)}, {})
    (path,) = tmp_path.iterdir()
    assert oct(path.stat().st_mode & 0o777) == "0o600"


def test_a_table_that_is_none_of_ours(run):
    """Of another content, or too large: one line that names it."""
    (record,) = run.trials()[:1]
    history = run.trial_folder(record.id) / "history.csv"
    for content, said in (
        (b"a,b\n1,2\n", "has no column"),
        (b"\xff\xfe\x00", "is no table of this project"),
        (b"", "is no table of this project"),
        (b'"a\n1,2,3\n"', "has no column"),
    ):
        history.write_bytes(content)
        with pytest.raises(BadInput, match=said):
            run.history(record.id)
    with history.open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(BadInput, match="is no table of this project"):
        run.history(record.id)


def test_a_table_of_very_many_columns(run):
    """Pandas would rename equal ones in quadratic time."""
    history = next(run.path.glob("trials/*/history.csv"))
    history.write_text(",".join(["a"] * 100_000) + "\n")
    with pytest.raises(BadInput, match="more than 500 columns"):
        run.history(history.parent.name)


def test_no_name_of_a_column_is_a_formula():
    assert csv_text(["=x"], [{"=x": 1}]) == "'=x\n1\n"
