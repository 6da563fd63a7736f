"""Edits of a run directory, as somebody else may hand one over: code that it names, links, files of other content. All
digests are valid."""

import hashlib
import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np

from harness.run import storage
from harness.run.directory import RunDirectory

PAYLOAD = """
from pathlib import Path
Path({mark!r}).touch()
def build(num_classes):
    raise SystemExit
def identity(data):
    return "x"
decode = build
"""


def edited(path: Path, change) -> None:
    """Change a sealed JSON file and seal it again."""
    value = storage.read_json(path)
    change(value)
    storage.write_json(path, value)


def parts(run: RunDirectory) -> tuple[Path, Path]:
    """The winner's manifest.json and trial.json."""
    (manifest,) = run.path.glob("exported/*/manifest.json")
    return manifest, run.trial_folder(manifest.parent.name) / "trial.json"


def evil_trial(run):
    edited(parts(run)[1], lambda v: v["config"].update(architecture=str(run.path.parent / "evil.py")))


def evil_trial_relative(run):
    edited(parts(run)[1], lambda v: v["config"].update(architecture="../evil.py"))


def evil_data(run):
    edited(run.path / "run.json", lambda v: v["config"]["data"].update(name=str(run.path.parent / "evil.py")))


def evil_manifest(run):
    edited(parts(run)[0], lambda v: v["config"].update(architecture=str(run.path.parent / "evil.py")))


def aoti_manifest(run):
    manifest, _ = parts(run)
    content = b"no package"
    (manifest.parent / "model.pt2").write_bytes(content)
    entry = {"format": "aoti", "sha256": storage.sha256(manifest.parent / "model.pt2"), "bytes": len(content)}
    edited(manifest, lambda v: v["files"].update({"model.pt2": entry}))


EDITS = {
    "architecture in trial.json": evil_trial,
    "relative architecture in trial.json": evil_trial_relative,
    "data set in run.json": evil_data,
    "architecture in manifest.json": evil_manifest,
    "compiled file in manifest.json": aoti_manifest,
}


# How winner.json may name code: what is changed in it, given the code's path.
WINNERS = {
    "architecture": lambda v, evil: v["trial"].update(architecture=evil),
    "dotted": lambda v, evil: v["trial"].update({"trial.architecture": evil}),
    "nested": lambda v, evil: v["trial"].update({"trial": {"architecture": evil}}),
    "weights": lambda v, evil: v["trial"]["options"].update(weights=evil),
    "data": lambda v, evil: v["data"].update(name=evil),
}


def linked_trial(run, victim):
    (folder,) = list((run.path / "trials").iterdir())[:1]
    shutil.rmtree(folder)
    folder.symlink_to(victim)


def linked(name):
    def make(run, victim):
        place = run.path / name
        if place.is_dir():
            shutil.rmtree(place)
        elif place.exists():
            place.unlink()
        place.symlink_to(victim if "." not in name.lstrip(".") else victim / "thesis.tex")

    return make


LINKS = {
    "a trial": linked_trial,
    **{name: linked(name) for name in ("trials", "exported", "report", "inspect", "run.log", "run.json", "trials.csv")},
    **{name: linked(name) for name in (".lock", ".owner", "inference.csv", "winner.json", "verdict.json")},
}


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


# Tables and arrays: what is written in place of history.csv, reference.npy and others.
TABLES = {
    "of 300 MB": lambda p: huge(p, 300 << 20),
    "of other columns": lambda p: p.write_bytes(b"a,b\n1,2\n"),
    "of 100,000 columns": lambda p: p.write_text(",".join(["a"] * 100_000) + "\n"),
    "one cell of 60 MB": lambda p: p.write_text("epoch\n" + "9" * 60_000_000 + "\n"),
    "binary": lambda p: p.write_bytes(bytes(range(256)) * 100),
    "a FIFO": lambda p: (p.unlink(), os.mkfifo(p)),
}
ARRAYS = {
    "a pickle": lambda p, mark: p.write_bytes(pickle.dumps(Payload(mark))),
    "an array of objects": lambda p, mark: np.save(p, np.array([Payload(mark)]), allow_pickle=True),
    "an archive": lambda p, mark: p.write_bytes(_archive()),
    "of 10^13 numbers": lambda p, mark: p.write_bytes(_header((10**12, 10))),
    "of 100 GB": lambda p, mark: huge(p, 100 << 30),
    "of another shape": lambda p, mark: np.save(p, np.zeros((3, 3))),
}


def _archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


def _header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


class Payload:
    """Leaves a mark if it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


def resealed(manifest: Path, file: str) -> None:
    """Record the digest of an array that a manifest names."""
    digest = hashlib.sha256(b"").hexdigest()
    if (manifest.parent / file).stat().st_size < 1 << 30:
        digest = storage.sha256(manifest.parent / file)
    edited(manifest, lambda v: v[file.removesuffix(".npy")].update(sha256=digest))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
