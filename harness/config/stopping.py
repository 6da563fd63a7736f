"""SIGTERM and SIGINT end a command in good order, within 15 s at every moment."""

import functools
import math
import os
import signal
import sys
import threading
import time

STOPPING = (signal.SIGINT, signal.SIGTERM)
ENDING_SECONDS = 14.0  # time to shut down after a signal; further signals within it are ignored
STOPPED = "stopped; run the same command again to continue"
_received: int | None = None
_received_at = -math.inf


def handle() -> None:
    """Handle both signals in this process, by KeyboardInterrupt in the main thread. Where that does not end it in time,
    say because native code executes, it is ended all the same: all files are written atomically."""
    for number in STOPPING:
        signal.signal(number, _stop)
    _watch()


@functools.cache
def _watch() -> None:
    """Start the thread that ends this process in time."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)  # written at once, while native code delays handlers
    threading.Thread(target=_end_in_time, args=(woken,), daemon=True).start()


def _stop(number: int, _frame: object) -> None:
    """Handle both signals with KeyboardInterrupt: Ray would turn a SystemExit into an error of one trial."""
    global _received, _received_at
    if time.monotonic() - _received_at < ENDING_SECONDS:
        return
    _received, _received_at = number, time.monotonic()
    raise KeyboardInterrupt


def _end_in_time(woken: int) -> None:
    while (number := os.read(woken, 1)[0]) not in STOPPING:
        pass
    time.sleep(ENDING_SECONDS)
    print(STOPPED, file=sys.stderr, flush=True)
    os._exit(128 + number)


def check_stopped() -> None:
    """Raises KeyboardInterrupt if a stop signal was received: the first one may be swallowed by a C callback."""
    if _received is not None:
        raise KeyboardInterrupt


def is_stopped() -> bool:
    return _received is not None


def ended() -> int:
    """Say that the command has stopped; returns its exit code."""
    for number in STOPPING:  # at exit the interpreter would restore the default handlers
        signal.signal(number, signal.SIG_IGN)
    print(STOPPED, file=sys.stderr)
    return 128 + (_received or signal.SIGINT)
