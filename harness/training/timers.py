"""Accounts for a trial's time: every second of it is booked under exactly one kind of work."""

import time

from harness.run.records import Timing

KINDS = {
    "queue": "worker waiting for its next trial",
    "worker start": "starting the worker process",
    "imports": "importing torch and this project",
    "data": "loading images and copying them to the device",
    "build": "building network and optimiser, initialising weights",
    "compile": "compiling kernels; the first step, if it is compiled or captured",
    "train": "training steps",
    "validate": "validation, and evaluation on the test split",
    "checkpoint": "copying the kept weights; writing files",
    "idle": "waiting for the driver, at the start and after each validation",
}


class Timers:
    """Books time under the kind last entered; `seconds` by kind adds up to the time since the start."""

    def __init__(self, kind: str = "build", started: float | None = None):
        """`started`: time.perf_counter() of the trial's first moment, which may lie in the past."""
        self.kind = kind
        self.mark = time.perf_counter() if started is None else started
        self.seconds: dict[str, float] = {}

    def enter(self, kind: str) -> None:
        """Book time under `kind` from now on."""
        assert kind in KINDS, kind
        now = time.perf_counter()
        self.seconds[self.kind] = self.seconds.get(self.kind, 0.0) + now - self.mark
        self.kind, self.mark = kind, now

    def of(self, kind: str) -> float:
        """Seconds booked under a kind so far, without those since the last `enter`."""
        return self.seconds.get(kind, 0.0)

    def book(self, timing: Timing) -> None:
        """Set `wall_seconds` until now, and `ledger` (seconds by kind), in a trial's timing."""
        self.enter(self.kind)
        timing.ledger = {kind: self.seconds[kind] for kind in KINDS if kind in self.seconds}
        timing.wall_seconds = sum(timing.ledger.values())
