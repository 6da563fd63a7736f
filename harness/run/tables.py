"""Tables as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import BadInput
from harness.run import storage
from harness.run.system import environment

if TYPE_CHECKING:
    import pandas as pd


FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would execute text that begins with one of these


def _cell(value: object) -> object:
    if isinstance(value, str) and value.startswith(FORMULA) and not _is_number(value):
        return f"'{value}"
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", restval="")
    writer.writerow({name: _cell(name) for name in writer.fieldnames})
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


LONGEST_HEADER, MOST_COLUMNS = 1 << 16, 500  # bytes; columns


def read_table(path: Path, columns: Iterable[str]) -> "pd.DataFrame":
    """Read a CSV file that has these columns. Raises BadInput where it is something else."""
    import pandas as pd

    try:
        storage.check_regular(path, storage.LARGEST_TABLE)
        with path.open("rb") as file:
            if file.readline(LONGEST_HEADER).count(b",") > MOST_COLUMNS:  # pandas would take hours
                raise ValueError(f"more than {MOST_COLUMNS} columns")
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: is no table of this project ({error}); remove it, and run the command again"
        ) from error
    if absent := [name for name in columns if name not in table]:
        raise BadInput(f"{path}: has no column {absent[0]}; remove it, and run again")
    return table


def write_measured(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a table of measurements as CSV and, as .json beside it, the machine they were made on."""
    storage.write_atomically(path, csv_text(columns, rows))
    environment().write(path.with_suffix(".json"))
