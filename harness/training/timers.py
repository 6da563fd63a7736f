"""Where a trial's time went: every second of it belongs to exactly one kind of work."""

import time

from harness.run.records import Timing

KINDS = {
    "queue": "worker waiting for its next trial",
    "worker start": "from the start of its process",
    "imports": "of torch and this project",
    "data": "decoded or mapped, and moved to the device",
    "build": "network and optimiser made, first weights drawn",
    "compile": "where anything is compiled or captured: kernels, or the first step",
    "train": "steps",
    "validate": "validations, and the test images where they are read",
    "checkpoint": "best weights kept; files written",
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
        """From now on it is `kind`."""
        assert kind in KINDS, kind
        now = time.perf_counter()
        self.seconds[self.kind] = self.seconds.get(self.kind, 0.0) + now - self.mark
        self.kind, self.mark = kind, now

    def of(self, kind: str) -> float:
        """Seconds that were booked under a kind so far, the current stretch aside."""
        return self.seconds.get(kind, 0.0)

    def book(self, timing: Timing) -> None:
        """Write `wall_seconds` until now, and the `ledger` of them by kind, into a trial's timing."""
        self.enter(self.kind)
        timing.ledger = {kind: self.seconds[kind] for kind in KINDS if kind in self.seconds}
        timing.wall_seconds = sum(timing.ledger.values())
