"""Progress output of a run: a live status on a terminal, plain lines in a pipe; all lines also go to run.log."""

import contextlib
import datetime
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from harness.config.errors import LONGEST, StorageError, shown
from harness.run.storage import storage_errors_of

PLAIN_EVERY_SECONDS = 20.0


class Progress:
    """`line` reports an event; `status` replaces the current status."""

    def __init__(self, log: Path | None = None, console: Console | None = None):
        self.console = console or Console(stderr=False, highlight=False, soft_wrap=True)
        self.log = log
        self._lost: StorageError | None = None
        self._live: Status | None = None
        self._last_plain = time.monotonic()

    def line(self, text: str) -> None:
        text = shown(text)
        self.console.print(escape(text))
        self._append(f"{datetime.datetime.now().isoformat(timespec='seconds')} {text}\n")

    def failure(self, what: str, error: BaseException) -> None:
        """Print one line; write the traceback to run.log."""
        lines = str(error).strip().splitlines()
        self.line(f"{what}: {type(error).__name__}: {shown(lines[0], LONGEST) if lines else ''}")
        self._append("".join(traceback.format_exception(error)))

    def _append(self, text: str) -> None:
        if self.log is None:
            return
        try:
            with storage_errors_of(self.log), self.log.open("a", encoding="utf-8") as file:
                file.write(text)
        except StorageError as error:
            self._lost = error
        except OSError:  # the folder was moved away: reported by the code that writes in it
            pass

    def check_logged(self) -> None:
        """Raises StorageError if lines of the log were lost; called last, so that results are written first."""
        if self._lost is not None:
            raise self._lost

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """On a terminal, show a spinner with the status below the printed lines; nested calls share one spinner."""
        if not self.console.is_terminal or self._live is not None:
            yield
            return
        try:
            with self.console.status("starting") as self._live:
                yield
        finally:
            self._live = None

    def status(self, text: str) -> None:
        """Update the live line on a terminal; in a pipe print a plain line every PLAIN_EVERY_SECONDS at most."""
        if self._live is not None:
            self._live.update(escape(text))
        elif not self.console.is_terminal and time.monotonic() - self._last_plain > PLAIN_EVERY_SECONDS:
            self._last_plain = time.monotonic()
            self.console.print(escape(text))

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A callback progress(done, total) that shows `what`, the counts and the time left."""
        started = time.monotonic()

        def show(done: int, total: int) -> None:
            left = (time.monotonic() - started) * (total - done) / max(done, 1)
            self.status(f"{what}: {done:,} of {total:,}, {duration(left)} left")

        return show


def counted(count: int, word: str) -> str:
    """A count with its noun: 1 seed, 2 seeds."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """Format seconds: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
