"""Tables as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.run import storage
from harness.run.system import environment


def csv_text(columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_measured(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a table of measurements as CSV and, as .json beside it, the machine they were made on."""
    storage.write_atomically(path, csv_text(columns, rows))
    environment().write(path.with_suffix(".json"))
