"""Runs commands one after another in one process under strace: what each answered, how long it took, what was written,
executed or connected to meanwhile, in any of its processes, and the most memory that one of them took."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conftest import TOP

DRIVER = """
import contextlib, gc, io, json, os, resource, runpy, sys, time, warnings
from pathlib import Path
_, given, found = sys.argv
cases, answers = json.load(open(given)), []
def mark(case):
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(f"/case/{case}")  # to be found in the trace
def memory(kind):
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(kind))
    return int(line.split()[1]) * 1024
warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: the module is known already
import harness, torch, onnxruntime  # not part of a case's time: a command imports them once
for number, (module, arguments, folder) in enumerate(cases):
    mark(number)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the largest memory is counted anew
    before = memory("VmRSS")
    out, err, started, code = io.StringIO(), io.StringIO(), time.monotonic(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            code = repr(error)
    seconds = time.monotonic() - started
    answers.append([code, err.getvalue(), seconds, memory("VmHWM") - before])
mark("end")
from harness.data import decoding
decoding.decoder().close()
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
json.dump({"answers": answers, "children": children}, open(found, "w"))
"""
CALLS = "execve,openat,open,creat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,symlink,symlinkat,link"
CALLS += ",linkat,truncate,ftruncate,chmod,fchmod,fchmodat,?fchmodat2,chown,lchown,fchownat,connect"
WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
LINE = re.compile(r" *(\w+)\((.*)\) += (-?\d+)")
UNFINISHED, RESUMED = " <unfinished ...>", re.compile(r" *<\.\.\. \w+ resumed>")


@dataclass
class Watched:
    """What happened. `answers`: exit code, standard error, seconds and bytes of memory that each case took in this
    process; `children`: the largest memory of one of the child processes; then what calls of the system tell, each
    with its case."""

    answers: dict[str, tuple[int, str, float, int]]
    children: int
    written: list[tuple[str, str, list[str]]] = field(default_factory=list)
    executed: list[tuple[str, str]] = field(default_factory=list)
    connected: list[tuple[str, str]] = field(default_factory=list)


def is_possible() -> bool:
    """Whether strace is installed, and allowed to watch a process."""
    try:
        return subprocess.run(["strace", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def watch(cases: Mapping[str, tuple[str, Sequence[str], Path]], place: Path) -> Watched:
    """Run each case: a module with `main`, its arguments and the folder to start in. `place`: a folder for what the
    cases may write: its `tmp` is their temporary folder, `cache` that of HARNESS_CACHE, `home` their home."""
    for name in ("tmp", "cache", "home"):
        (place / name).mkdir(parents=True)
    given, found, trace = place / "cases.json", place / "found.json", place / "trace"
    given.write_text(json.dumps([(module, words, str(folder)) for module, words, folder in cases.values()]))
    own = {"TMPDIR": "tmp", "HARNESS_CACHE": "cache", "HOME": "home"}
    subprocess.run(
        ["strace", "-f", "-qq", "-y", "--seccomp-bpf", "-s", "4096", "-o", str(trace), "-e", f"trace={CALLS}"]
        + [sys.executable, "-c", DRIVER, str(given), str(found)],
        env={**os.environ, **{name: str(place / folder) for name, folder in own.items()}}
        | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(TOP), "CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )
    told = json.loads(found.read_text())
    answers = {name: tuple(one) for name, one in zip(cases, told["answers"], strict=True)}
    watched = Watched(answers, told["children"])
    _read_trace(trace, list(cases), watched)
    return watched


def _read_trace(trace: Path, names: Sequence[str], watched: Watched) -> None:
    """Add what the trace tells. Calls that failed changed nothing."""
    case, begun = "start", dict[str, str]()
    for line in trace.read_text(errors="replace").splitlines():
        process, _, text = line.partition(" ")
        if text.endswith(UNFINISHED):  # the call of another process or thread stands between its two lines
            begun[process] = text.removesuffix(UNFINISHED)
            continue
        if resumed := RESUMED.match(text):
            text = begun.pop(process, "") + text[resumed.end() :]
        if mark := re.search(r'"/case/(\w+)"', text):
            case = names[int(mark[1])] if mark[1].isdecimal() else "end"
            continue
        call = LINE.match(text)
        if not call or int(call[3]) < 0:
            continue
        name, arguments = call[1], call[2]
        if name == "execve":
            watched.executed.append((case, arguments))
        elif name == "connect":
            watched.connected.append((case, arguments))
        elif not name.startswith("open") or _writes(arguments):
            watched.written.append((case, name, _paths(arguments)))


def _writes(arguments: str) -> bool:
    """Whether a file is opened for writing; one without a name is gone when it is closed."""
    flags = arguments.rpartition('"')[2]
    return bool(WRITING.search(flags)) and "O_TMPFILE" not in flags


def _paths(arguments: str) -> list[str]:
    """The paths in a call's arguments, absolute: those in quotes, after the folder that they are relative to; where
    there are none, those of file descriptors."""
    found = []
    for folder, path in re.findall(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', arguments):
        found.append(os.path.normpath(os.path.join(folder, path)))  # noqa: PTH118
    return found or re.findall(r"\d+<([^>]*)>", arguments)
