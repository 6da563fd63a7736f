"""Which code a run directory or a folder of exported files may make run.

Anybody can write such a folder, with valid digests. Code that it names, an architecture's or a data set's FILE.py or a
compiled .pt2 file, runs only if the user has named the file on a command line before, or has made it, or says
`trust=true`. The user's cache remembers such files by their path and content.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import BadInput
from harness.config.errors import shown
from harness.run import storage
from harness.run.cache import cache_folder
from harness.run.manifest import Manifest
from harness.run.provenance import changed_files, network_files

if TYPE_CHECKING:
    from harness.run.directory import RunDirectory
    from harness.run.records import TrialRecord


def remember(path: Path) -> None:
    """Trust a file as it is now."""
    mark = _mark(path)
    mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    mark.touch()


def _mark(path: Path) -> Path:
    text = f"{path.resolve()}\0{storage.sha256(path)}"
    return cache_folder("trusted") / hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def trusted_run(path: Path, trust: bool) -> "RunDirectory":
    """An existing run, for a command that executes code which the run names: prints what runs because of `trust`.

    Raises BadInput where there is no run, or it names code that is not trusted.
    """
    from harness.run.directory import RunDirectory

    run = RunDirectory.existing(path)
    run.check_own()
    for line in check_run(run, trust):
        print(shown(line))
    return run


def check_run(run: "RunDirectory", trust: bool, named: Collection[str] = ()) -> list[str]:
    """Check the code that the files of a run name; `named`: on this command line. Returns a line for each file that
    runs because of `trust`. Raises BadInput for another one."""
    found: dict[str, str] = {}
    recorded = run.configuration()
    if recorded is not None:
        data = recorded.config.get("data")
        found[str(data.get("name") if isinstance(data, dict) else data)] = "run.json"
    found |= {str(record.config.get("architecture")): f"trial {record.id}" for record in run.trials()}
    manifests = []
    for path in run.path.glob("exported/*/manifest.json"):
        try:
            manifests.append((path, Manifest.read(path)))
        except (OSError, ValueError):  # whoever needs it says so
            continue
    code = [
        (name, where)
        for name, where in found.items()
        if name.endswith(".py") and str(Path(name).expanduser().absolute()) not in named
    ]
    code += [one for path, manifest in manifests for one in _of_manifest(path, manifest) if one[0] not in named]
    return list(_lines(code, trust, f"run={run.path}"))


def check_exported(file: Path, manifest: Manifest, trust: bool) -> list[str]:
    """The same for one exported file."""
    wanted = {"torch": ".py", "aoti": file.name}.get(manifest.files[file.name].format)
    code = [one for one in _of_manifest(file.parent / "manifest.json", manifest) if wanted and one[0].endswith(wanted)]
    return list(_lines(code, trust, f"model={file}"))


def _of_manifest(path: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    where = f"{path.parent.name}/manifest.json"
    if (architecture := str(manifest.config.get("architecture"))).endswith(".py"):
        yield architecture, where
    yield from ((str(path.parent / name), where) for name, entry in manifest.files.items() if entry.format == "aoti")


def check_names(names: Iterable[object], where: str, trust: bool, subject: str) -> None:
    """Raises BadInput where a file that is no run names files (code, or weights to start from) that are not trusted."""
    list(_lines([(str(name), where) for name in names], trust, subject))


def _lines(code: list[tuple[str, str]], trust: bool, subject: str) -> Iterator[str]:
    for name, where in dict.fromkeys(code):
        path = Path(name).expanduser().absolute()
        if not path.is_file() or _mark(path).exists():
            continue
        if not trust:
            raise BadInput(f"{subject}: {where} names {path}, whose code would run; look at it, then add trust=true")
        yield f"trust=true: runs {path}, which {where} names"


def check_network_code(run: "RunDirectory", record: "TrialRecord") -> None:
    """Raises BadInput where the files of a trial's network are not those that it was trained with."""
    architecture = record.trial.architecture
    known = run.recorded().code.get(architecture, {})
    before = {name: digest for name, digest in known.items() if name.startswith("user/")}
    if before and (changed := changed_files(before, network_files(architecture))):
        raise BadInput(
            f"run={run.path}: {', '.join(changed[:5])} changed since trial {record.id} was trained: its weights belong "
            "to other code; restore the file, or train again with run=NEW"
        )


def check_manifest_code(file: Path, manifest: Manifest) -> None:
    """Raises BadInput where the files of an exported network are not those that it was trained with."""
    now = network_files(str(manifest.config.get("architecture")))
    if manifest.code and (changed := changed_files(manifest.code, now)):
        raise BadInput(
            f"model={file}: {', '.join(changed[:5])} changed since it was trained: its weights belong to other code; "
            "restore the file, or use an ONNX file"
        )
