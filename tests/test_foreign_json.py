"""JSON files of a run that are none of ours: a reader refuses them, or leaves them out, at once."""

import contextlib
import shutil
import time

import pytest
from hostile_runs import REFUSED_JSON, parts

from harness.config import BadInput
from harness.run import storage, trust
from harness.run.directory import RunDirectory


@pytest.mark.parametrize("kind", REFUSED_JSON)
@pytest.mark.parametrize("file", ["trial.json", "run.json", "manifest.json", "verdict.json", "winner.json"])
def test_json_that_is_none_of_ours(file, kind, run):
    manifest, trial = parts(run)
    path = {"trial.json": trial, "manifest.json": manifest}.get(file, run.path / file)
    REFUSED_JSON[kind](path)
    if file == "run.json":
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else None
        (run.path / "run.copy.json").unlink()
    started = time.monotonic()
    read_all(run)
    assert time.monotonic() - started < 20


def read_all(run: RunDirectory) -> None:
    """Read all that a command reads; nothing but BadInput, Corrupt or an absent file may come of it."""
    from export.exporter import is_exported
    from harness.config import Export
    from harness.reporting.results import Results

    for read in (
        lambda: run.configuration(),
        lambda: trust.check_run(run, False),
        lambda: Results.of(run).headline,
        lambda: [run.history(record.id) for record in run.trials()],
        lambda: [is_exported(run.exported_folder(r.id), r, Export()) for r in run.trials()],
        lambda: run.set_aside_corrupt(),
    ):
        if run.configuration_file.is_file():
            with contextlib.suppress(BadInput, storage.Corrupt):
                read()
