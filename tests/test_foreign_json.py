"""JSON files of a run that are none of ours: a reader refuses them, or leaves them out, at once."""

import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from harness.config import BadInput
from harness.run import storage, trust
from harness.run.directory import RunDirectory


def parts(run: RunDirectory) -> tuple[Path, Path]:
    """The winner's manifest.json and trial.json."""
    (manifest,) = run.path.glob("exported/*/manifest.json")
    return manifest, run.trial_folder(manifest.parent.name) / "trial.json"


def huge(path, size=200 << 20):
    with path.open("wb") as file:
        file.truncate(size)


REFUSED_JSON = {
    "of 200 MB": huge,
    "empty": lambda p: p.write_bytes(b""),
    "a list": lambda p: sealed(p, b"[\n  1"),
    "nested": lambda p: sealed(p, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000),
    "not UTF-8": lambda p: sealed(p, b'{"a": "\xff"'),
    "a FIFO": lambda p: (p.unlink(missing_ok=True), os.mkfifo(p)),
    "a folder": lambda p: (p.unlink(missing_ok=True), p.mkdir()),
    "a device": lambda p: (p.unlink(missing_ok=True), p.symlink_to("/dev/zero")),
    "a link to nothing": lambda p: (p.unlink(missing_ok=True), p.symlink_to("/no/where")),
    "NaN": lambda p: sealed(p, b'{"seed": NaN, "config": NaN, "status": NaN'),
    "of numbers": lambda p: sealed(p, b'{"seed": 1, "config": 3, "status": 5'),
    "of an unknown status": lambda p: sealed(p, b'{"seed": 1, "config": {}, "status": "won"'),
}


def sealed(path, body):
    path.write_bytes(body + b',\n  "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n')


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
