"""One sitting of the inference benchmark: one process per arm, measured in interleaved rounds.

A replicate starts a fresh process for every arm. Within it arms are measured in rounds, in a new random order each,
while the other arms block in a read; the reference runs twice, under two names.
"""

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.inference import conditions, operators
from export.check import Check
from export.process import RuntimeProcess, memory_limit
from export.runtimes import Unavailable
from harness.config import Benchmark
from harness.run.manifest import ParityRecord
from harness.run.storage import Json

if TYPE_CHECKING:
    from harness.run.progress import Progress


REFERENCE = "torch_eager"
AGAIN = "torch_eager_again"
EXACT = 1e-3  # allowed difference of timed from checked float32 logits; other precisions: SHARE of the largest logit
SHARE = 0.05


@dataclass
class Arm:
    """A file that a runtime serves; `note` says why it is not timed, if so."""

    name: str
    check: Check
    precision: str
    note: str = ""
    accuracy: ParityRecord | None = None  # from the check
    images_per_second: float = 0.0  # during the check


class ArmProcess(RuntimeProcess):
    """A process that serves an arm; see benchmarks/inference/server.py."""

    def __init__(self, arm: Arm, threads: int, images: Path, log: Path):
        self.arm = arm
        with log.open("a") as errors:
            limit = memory_limit(arm.check.device)
            super().__init__(threads, module="benchmarks.inference.server", memory_bytes=limit, errors=errors)
        try:
            self.cold = self.load(arm.check, images)
        except BaseException:
            self.close()
            raise
        self.scopes = self.cold.pop("scopes")  # in which the arm can be timed

    def ask(self, do: str, **request: Any) -> Json:
        try:
            return super().ask(do, **request)
        except Unavailable:
            raise
        except RuntimeError as error:
            raise RuntimeError(f"{self.arm.name}: {error}") from error

    def __enter__(self) -> "ArmProcess":
        return self


@dataclass
class Sitting:
    """Arms and settings that all replicates share."""

    arms: list[Arm]
    images: Path
    largest: float  # absolute value of the reference's logits
    settings: Benchmark
    threads: int
    log: Path

    def replicate(self, number: int, progress: "Progress") -> tuple[list[Json], list[Json], list[Json]]:
        """Rows of inference.csv, start-up costs of each arm, and (first replicate) rows of inference_operators.csv."""
        order = random.Random(number)
        rows, profiled = list[Json](), list[Json]()
        with contextlib.ExitStack() as stack:
            workers: dict[str, ArmProcess] = {}
            arms = [arm for arm in self.arms if not arm.note]
            again = Arm(AGAIN, arms[0].check, arms[0].precision)
            for arm in order.sample([*arms, again], len(arms) + 1):
                progress.status(f"{self._where(number)}: starting {arm.name}")
                with self._leaving(workers, arm):
                    worker = stack.enter_context(ArmProcess(arm, self.threads, self.images, self.log))
                    if not set(worker.scopes) & set(self.settings.scopes):
                        worker.close()
                        raise Unavailable("takes only host arrays")
                    workers[arm.name] = worker
            for batch_size in order.sample(self.settings.batch_sizes, len(self.settings.batch_sizes)):
                for scope in self.settings.scopes:
                    rows += self._cell(number, batch_size, scope, workers, order, progress)
            rows = [row for row in rows if row["backend"] in workers]
            if self.settings.latency_ms is not None:
                for worker in workers.values():
                    progress.status(f"{self._where(number)}: single images at random to {worker.arm.name}")
                    worker.cold["rate"] = highest_rate(worker, self.settings.latency_ms, number)
            cold = [{"backend": name, **worker.cold, **worker.ask("memory")} for name, worker in workers.items()]
            for name in [arm.name for arm in arms if number == 0 and arm.name in workers]:
                progress.status(f"{self._where(number)}: profile of {name}")
                profiled += self._operators(workers[name])
        return rows, cold, profiled

    def _operators(self, worker: ArmProcess) -> list[Json]:
        """Rows of inference_operators.csv, at the batch size that the recommendation targets."""
        batch_size, rows = self.settings.recommended_batch_size, []
        found = worker.ask("operators", batch_size=batch_size, calls=3)["operators"]
        for operator, seconds in sorted(found.items(), key=lambda item: -item[1]):
            row = {"artifact": worker.arm.check.artifact.label, "backend": worker.arm.name, "batch_size": batch_size}
            share = {"kind": operators.kind(operator), "share": seconds / sum(found.values()), "ms": 1000 * seconds}
            rows.append(row | {"operator": operator} | share)
        return rows

    def _where(self, number: int) -> str:
        return f"benchmark: replicate {number + 1}"

    def _cell(
        self,
        number: int,
        batch_size: int,
        scope: str,
        workers: dict[str, ArmProcess],
        order: random.Random,
        progress: "Progress",
    ) -> list[Json]:
        """Rows of one batch size and scope; an arm that fails is removed from `workers`, and its note says why."""
        rows, calls, notes = [], {}, {}
        where = f"{self._where(number)}, batch size {batch_size}, {scope}"
        for name, worker in list(workers.items()):
            if scope not in worker.scopes:
                continue
            progress.status(f"{where}: warming up {name}")
            with self._leaving(workers, worker.arm):
                answers = str(worker.arm.check.answers)
                warm = worker.ask("warm_up", batch_size=batch_size, answers=answers, scope=scope)
                calls[name] = max(1, round(self.settings.round_seconds / warm["call_seconds"]))
                notes[name] = "" if warm["settled"] else "call times did not settle during warm-up"
        progress.status(where)
        for turn in range(self.settings.rounds):
            timed = [name for name in calls if name in workers]
            for name in order.sample(timed, len(timed)):
                with self._leaving(workers, workers[name].arm):
                    row = self._round(workers[name], calls[name], batch_size, scope)
                    row |= {"replicate": number, "round": turn, "note": row["note"] or notes[name]}
                    rows.append(row)
        return rows

    @contextlib.contextmanager
    def _leaving(self, workers: dict[str, ArmProcess], arm: Arm) -> Iterator[None]:
        try:
            yield
        except (Unavailable, RuntimeError) as reason:
            if arm.name in (REFERENCE, AGAIN):
                raise
            arm.note = f"not timed: {reason}"
            workers.pop(arm.name, None)

    def _round(self, worker: ArmProcess, calls: int, batch_size: int, scope: str) -> Json:
        arm, others, started = worker.arm, conditions.Others(), time.perf_counter()
        told = worker.ask("measure", calls=calls)
        foreign = others.cores(told["cores"], time.perf_counter() - started)
        limit = EXACT if arm.precision == "float32" else SHARE * self.largest
        if not told["away"] <= limit:
            raise RuntimeError(f"logits of a timed call differ by {told['away']:.2g} from the checked ones")
        beyond = told["cores"] > self.threads + conditions.BEYOND
        return {
            "artifact": arm.check.artifact.label,
            "backend": arm.name,
            "precision": arm.precision,
            "device": arm.check.device,
            "batch_size": batch_size,
            "threads": self.threads,
            "scope": self.settings.scopes[scope],
            "images": len(told["seconds"]) * batch_size,
            "seconds": sum(told["seconds"]),
            "call_ms": " ".join(f"{1000 * s:.4g}" for s in told["seconds"]),
            "event_ms": " ".join(f"{1000 * s:.4g}" for s in told["event_seconds"]),
            "foreign_cores": round(foreign, 3),
            "note": f"uses {told['cores']:.1f} cores, not {self.threads}" if beyond else "",
        }

    def estimated_seconds(self) -> float:
        """Estimated duration of one replicate, from the speed of the arms during their checks."""
        total = 0.0
        for arm in [*self.arms, self.arms[0]]:  # the reference twice
            total += 3.0  # start-up
            for batch_size in self.settings.batch_sizes:
                call = batch_size / max(arm.images_per_second, 1e-3)
                each = max(0.25, 2.5 * call) + self.settings.rounds * max(self.settings.round_seconds, call)
                total += len(self.settings.scopes) * each
        return total


def highest_rate(worker: ArmProcess, latency_ms: float, seed: int) -> float:
    """The highest rate of randomly arriving images, per second, with a p90 latency of at most `latency_ms`; 0 if none.

    The rate is doubled while that holds, then bisected.
    """

    def holds(rate: float) -> bool:
        seconds = min(2.0, max(0.5, 100 / rate))
        latencies = worker.ask("serve", rate=rate, seconds=seconds, seed=seed)["latencies"]
        return float(np.quantile(latencies, 0.9)) * 1000 <= latency_ms

    low, high = 0.0, 1000 / latency_ms
    while high < 1e6 and holds(high):
        low, high = high, 2 * high
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
