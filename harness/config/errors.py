"""The exceptions for errors that the user can fix, and how foreign text is shown on a terminal."""

import sysconfig
import traceback
from pathlib import Path


class BadInput(ValueError):
    """Bad input, found before any work starts; its one-line message says what to do. Commands exit with code 2."""


class NotYet(RuntimeError):
    """What an earlier stage makes is not there. A command that reads it exits with code 2; as a stage of `harness.tune`
    it failed, and the others go on."""


class StorageError(OSError):
    """The disk refuses a write: it is full, over quota or read-only, or the file is too large."""


def raised_at(error: BaseException) -> str:
    """The last line of the user's code, as ` at FILE:LINE: text`; empty if there was none: not of Python itself, of
    installed packages, or of this project's packages that call the user's code."""
    project = Path(__file__).parents[2]
    others = (sysconfig.get_path("stdlib"), project / "export", project / "harness")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        is_installed = {"site-packages", "dist-packages"} & set(file.parts)
        if file.is_file() and not is_installed and not any(file.is_relative_to(other) for other in others):
            return f" at {frame.filename}:{frame.lineno}: {frame.line}"
    return ""


LONGEST = 300  # characters of an error


def shown(text: object, longest: int | None = None) -> str:
    """Text of unknown origin on one line: control characters and broken Unicode escaped, the middle left out where it
    is longer than `longest`."""
    one_line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    if longest is not None and len(one_line) > longest:
        end = longest // 3
        one_line = f"{one_line[: longest - end - 5]} ... {one_line[-end:]}"
    return one_line
