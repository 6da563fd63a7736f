"""python -m benchmarks.kills [key=value ...]: sweeps killed at random moments, against an uninterrupted one.

Each row kills one victim while trials run: the driver alone (the same command is then run again), a worker process, or
all processes of a node of a three-node cluster on this machine. The outcome must equal that of the uninterrupted sweep.
The signal is SIGKILL or, for driver and worker, SIGTERM, after which a driver must end within 15 s with exit code 143.
`out`: one row per kill, written after each. Exit code 1 if any row has a problem.

    python -m benchmarks.kills victims=[driver] seeds=[7]      repeats the kill with seed 7
"""

import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.sweeps import (
    KillableCluster,
    Reference,
    Sweep,
    command_of,
    lives,
    outcome,
    training_workers,
)
from harness.config import Strict, command_line
from harness.run.storage import Json
from harness.run.tables import write_measured

ORPHANS_SECONDS, TERMINATED_SECONDS = 30.0, 15.0
COLUMNS = (
    *("victim", "signal", "seed", "moment_seconds", "running", "finished", "lost_epochs", "continued", "exit_code"),
    *("equal", "ran_again", "orphans_after_seconds", "problems"),
)
Victim = Literal["driver", "worker", "node"]


class Kills(Strict):
    victims: list[Victim] = Field(["driver", "worker", "node"], min_length=1, description="what to kill")
    seeds: list[int] | None = Field(None, description="seeds of the moments, to repeat kills; default: 0, 1, ...")
    kills: int = Field(20, ge=1, description="kills of each victim, if no seeds are given")
    signal: Literal["KILL", "TERM"] = Field("KILL", description="signal to a driver or worker; a node always gets KILL")
    out: Path = Field(Path("kills.csv"), description="output table, one row per kill")


def main(config: Kills) -> int:
    from harness.run.progress import Progress

    progress = Progress()
    rows: list[Json] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary, contextlib.ExitStack() as stack:
        top = Path(temporary)
        progress.line("the uninterrupted sweep")
        reference = Reference.of(top / "alone")
        cluster = stack.enter_context(KillableCluster.of_three()) if "node" in config.victims else None
        for seed in config.seeds or range(config.kills):
            for victim in config.victims:
                for latest in (0.9, 0.45, 0.2):  # share of the uninterrupted sweep's time; this one may end earlier
                    folder = top / f"{victim}{seed}-{latest}"
                    row = Kill(victim, config.signal, seed, latest, reference, folder, cluster).row()
                    if row["running"]:
                        break
                rows.append(row)
                write_measured(config.out, COLUMNS, rows)
                progress.line(" ".join(f"{name}={row[name]}" for name in COLUMNS if row[name] != ""))
                if not row["problems"]:
                    shutil.rmtree(folder)
    wrong = [row for row in rows if row["problems"]]
    progress.line(f"{len(rows) - len(wrong)} of {len(rows)} as they must be")
    return 1 if wrong else 0


class Kill:
    """A sweep of which one victim is killed at a random moment; `row` runs it and returns a row of the table.

    `latest`: the latest moment, as a share of the reference's time.
    """

    def __init__(
        self,
        victim: Victim,
        name: str,
        seed: int,
        latest: float,
        reference: Reference,
        folder: Path,
        cluster: KillableCluster | None,
    ):
        self.victim, self.signal, self.reference, self.cluster = victim, name, reference, cluster
        self.draw = random.Random(f"{victim} {seed}")
        more: Sequence[str] = ()
        if victim == "node":
            assert cluster is not None
            cluster.mend()
            more = [f"resources.address={cluster.cluster.address}"]
        if name == "TERM" and victim == "worker":
            more = ["resources.retries=0"]  # preemption must not consume a retry
        self.sweep = Sweep(folder, *more)
        self.problems: list[str] = []
        self.columns: Json = dict.fromkeys(COLUMNS, "")
        self.columns |= {"victim": victim, "signal": name, "seed": seed}
        self.moment = self.draw.uniform(0, latest) * reference.seconds

    def row(self) -> Json:
        targets = self.targets_at_the_moment()
        finished, running = self.sweep.finished(), self.sweep.running()
        epochs = {trial: self.sweep.epoch(trial) for trial in running}
        self.columns["running"] = len(running)
        self.problems += [] if running and targets else ["nothing was running"]
        if self.victim == "driver":
            self.kill_driver()
            finished = self.sweep.finished()  # a trial at its last step may have ended before the kill
            self.sweep.start()
        elif targets and self.victim == "worker":
            self.draw.choice(targets).send_signal(signal.Signals[f"SIG{self.signal}"])
        elif targets and self.cluster:
            self.cluster.kill(self.draw.choice(targets))
        code, said = self.sweep.wait()
        self.columns["exit_code"] = code
        self.problems += [f"exit code {code}: {said}"] if code else []
        if self.victim != "driver" and "continues from its last checkpoint" not in self.sweep.said.read_text():
            self.problems.append("no trial was rescheduled")
        self.compare(finished, epochs)
        return self.columns | {"problems": "; ".join(self.problems)}

    def targets_at_the_moment(self) -> list[Any]:
        """Start the sweep and wait for the moment; returns the workers or nodes that can be killed then."""
        self.sweep.start()
        self.sweep.until_running()
        started = time.monotonic()
        time.sleep(self.moment)
        assert self.sweep.process is not None
        targets: list[Any] = []
        while self.sweep.process.poll() is None and not (self.sweep.running() and targets):  # a kill interrupts work
            of_node = self.victim == "node" and self.cluster
            targets = self.cluster.training() if of_node and self.cluster else training_workers(self.sweep.processes())
            time.sleep(0.01)
        self.columns["moment_seconds"] = round(time.monotonic() - started, 2)
        return targets

    def kill_driver(self) -> None:
        """Kill the driver and wait, at most 30 s, until no process of its sweep is left."""
        assert self.sweep.process is not None
        killed, left = time.monotonic(), self.sweep.processes()
        self.sweep.process.send_signal(signal.Signals[f"SIG{self.signal}"])
        code = self.sweep.process.wait()
        took = time.monotonic() - killed
        if self.signal == "TERM" and (code != 143 or took > TERMINATED_SECONDS):
            self.problems.append(f"exit code {code} after {took:.1f} s")
        killed = time.monotonic()
        while (
            left := {p for p in left | self.sweep.processes() if lives(p)}
        ) and time.monotonic() - killed < ORPHANS_SECONDS:
            time.sleep(0.2)
        self.columns["orphans_after_seconds"] = round(time.monotonic() - killed, 1)
        self.problems += [f"process {p.pid} is left: {' '.join(command_of(p))[:100]}" for p in left]

    def compare(self, finished: dict[str, bytes], epochs: dict[str, float]) -> None:
        """Compare with the reference; `finished`: trials before the kill, `epochs`: those of running trials then."""
        found = {record.id: record for record in self.sweep.run.trials()}
        lost = []
        for trial, epoch in epochs.items():
            again = found[trial].continued if trial in found else []
            if again or (self.victim == "driver" and trial not in finished):
                lost.append(max(0.0, epoch - (again[-1].epoch if again else 0.0)))
        self.columns["finished"] = len(finished)
        self.columns["continued"] = sum(bool(record.continued) for record in found.values())
        self.columns["lost_epochs"] = max(lost, default="")
        self.problems += [f"{max(lost):g} epochs lost"] if lost and max(lost) > 1 else []
        self.columns["equal"] = outcome(self.sweep.run) == self.reference.outcome
        self.problems += [] if self.columns["equal"] else ["outcome differs from the uninterrupted sweep"]
        ran_again = sum(self.sweep.finished().get(trial) != before for trial, before in finished.items())
        self.columns["ran_again"] = ran_again
        self.problems += ["a finished trial ran again"] if ran_again else []


if __name__ == "__main__":
    sys.exit(command_line.run_command(Kills, main, __doc__ or ""))
