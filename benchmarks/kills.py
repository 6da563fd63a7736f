"""python -m benchmarks.kills [key=value ...]: sweeps killed at random moments, against one that was left alone.

Each row kills one process while trials run: the driver alone (and the same command is given again), a worker, or the
processes of a node of a cluster of three on this machine; then compares with the uninterrupted sweep. SIGKILL, or for
driver and worker SIGTERM, after which a driver has to end in 15 s with exit code 143.
`out`: one row a kill, written after each. Exit code 1 where one of them is not as it must be.

    python -m benchmarks.kills victims=[driver] seeds=[7]      once more what row 7 did
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field

from harness import cli, results
from harness.config import Strict
from harness.results import HISTORY, TRIAL, RunDirectory

SWEEP = (
    *("space=quick", "stages=[search]", "search.samples=4", "trial.epochs=16", "trial.options.widths=[[4,8],[8,8]]"),
    *("trial.validations_per_epoch=4", "trial.checkpoint_seconds=0", "trial.compile=off", "resources.cpus_per_trial=1"),
)
MARK = "HARNESS_KILLS"  # in the environment of all processes of a sweep
ORPHANS_SECONDS, TERMINATED_SECONDS = 30.0, 15.0
COLUMNS = (
    *("victim", "signal", "seed", "moment_seconds", "running", "finished", "lost_epochs", "continued", "exit_code"),
    *("equal", "ran_again", "orphans_after_seconds", "problems"),
)
Victim = Literal["driver", "worker", "node"]


class Kills(Strict):
    victims: list[Victim] = Field(["driver", "worker", "node"], min_length=1, description="what is killed")
    seeds: list[int] | None = Field(None, description="of the moments, to repeat some; default: 0, 1, ...")
    kills: int = Field(20, ge=1, description="of each victim, where no seeds are given")
    signal: Literal["KILL", "TERM"] = Field("KILL", description="sent to them; a node is always killed")
    out: Path = Field(Path("kills.csv"), description="table, a row a kill")


def main(config: Kills) -> int:
    from harness.progress import Progress

    progress = Progress()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary, contextlib.ExitStack() as stack:
        top = Path(temporary)
        progress.line("the sweep that is left alone")
        reference = Reference.of(top / "alone")
        cluster = stack.enter_context(Cluster.of_three()) if "node" in config.victims else None
        for seed in config.seeds or range(config.kills):
            for victim in config.victims:
                for latest in (0.9, 0.45, 0.2):  # of the uninterrupted sweep; this one may have ended earlier
                    folder = top / f"{victim}{seed}-{latest}"
                    row = kill(victim, config.signal, seed, latest, reference, folder, cluster)
                    if row["running"]:
                        break
                rows.append(row)
                results.write_measured(config.out, COLUMNS, rows)
                progress.line(" ".join(f"{name}={row[name]}" for name in COLUMNS if row[name] != ""))
                if not row["problems"]:
                    shutil.rmtree(folder)
    wrong = [row for row in rows if row["problems"]]
    progress.line(f"{len(rows) - len(wrong)} of {len(rows)} as they must be")
    return 1 if wrong else 0


@dataclass(frozen=True)
class Reference:
    """What a sweep comes to, whatever happens to it."""

    outcome: dict[str, Any]
    seconds: float  # from its first trial's start to its end

    @classmethod
    def of(cls, folder: Path) -> "Reference":
        sweep = Sweep(folder)
        sweep.start()
        sweep.until_running()
        started = time.monotonic()
        code, said = sweep.wait()
        if code:
            raise RuntimeError(f"the sweep that is left alone fails: {said}")
        return cls(outcome(sweep.run), time.monotonic() - started)


def outcome(run: RunDirectory) -> dict[str, Any]:
    """Of each trial what must not depend on interruptions."""
    found = {}
    for record in run.trials():
        history = (run.trial_folder(record["id"]) / HISTORY).read_text().splitlines()
        curve = [line.rsplit(",", 1)[0] for line in history]  # the last column is the time
        found[record["id"]] = (record["status"], record["metrics"], record.get("weights_sha256"), curve)
    return found


class Sweep:
    """One run directory, and the command that fills it."""

    def __init__(self, folder: Path, *more: str):
        folder.mkdir(parents=True)
        self.run = RunDirectory(folder / "run")
        self.mark = f"{os.getpid()}-{folder.name}"
        given = {argument.split("=")[0] for argument in more}
        own = [argument for argument in SWEEP if argument.split("=")[0] not in given]
        self.arguments = [sys.executable, "-m", "harness.tune", *own, f"run={self.run.path}", *more]
        self.said = folder / "said.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                self.arguments, stdout=said, stderr=said, env={**os.environ, MARK: self.mark}, start_new_session=True
            )

    def wait(self, seconds: float = 300.0) -> tuple[int, str]:
        """(exit code, last line)"""
        assert self.process is not None
        code = self.process.wait(seconds)
        return code, self.said.read_text().strip().splitlines()[-1]

    def until_running(self) -> None:
        assert self.process is not None
        while not self.running():
            if self.process.poll() is not None:
                raise RuntimeError(f"the sweep ended before a trial began: {self.said.read_text()}")
            time.sleep(0.02)

    def running(self) -> list[str]:
        """Trials that have validated and not ended."""
        folders = {path.parent for path in self.run.path.glob(f"trials/*/{HISTORY}")}
        return sorted(f.name for f in folders if not (f / TRIAL).exists())

    def finished(self) -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in self.run.path.glob(f"trials/*/{TRIAL}")}

    def epoch(self, trial: str) -> float:
        """Of the trial's last validation."""
        with contextlib.suppress(OSError):
            last = (self.run.trial_folder(trial) / HISTORY).read_text().splitlines()[-1]
            if last[0].isdigit():
                return float(last.split(",")[0])
        return 0.0

    def processes(self) -> set[psutil.Process]:
        """All that the command started and that lives: with its mark, whoever their parent is now, or below it.

        Ray's workers overwrite their environment by their title, and with it the mark.
        """
        assert self.process is not None
        found = set()
        with contextlib.suppress(psutil.Error):
            found.update(psutil.Process(self.process.pid).children(recursive=True))
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    found.add(process)
        return {process for process in found if lives(process)}


def lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def command_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return ["ended meanwhile"]


def training(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Workers that are in a step of a trial, which Ray puts into their titles."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline()).strip()
            if title.startswith("ray::") and title.endswith(".train"):
                found.append(process)
    return found


class Cluster:
    """A head and two nodes of one CPU each on this machine; all trials run on those."""

    def __init__(self, cluster: Any):
        self.cluster = cluster
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    @classmethod
    @contextlib.contextmanager
    def of_three(cls) -> "Iterator[Cluster]":
        from ray.cluster_utils import Cluster as Nodes

        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            yield cls(nodes)
        finally:
            nodes.shutdown()

    def training(self) -> list[Any]:
        """Nodes with a worker in a step of a trial."""
        return [n for n in self.nodes if training(psutil.Process(self.raylet(n)).children(recursive=True))]

    @staticmethod
    def raylet(node: Any) -> int:
        return node.all_processes["raylet"][0].process.pid

    def kill(self, node: Any) -> None:
        """All of its processes at once, as when a machine goes away."""
        raylet = psutil.Process(self.raylet(node))
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def mend(self) -> None:
        while len(self.nodes) < 2:
            self.nodes.append(self.cluster.add_node(num_cpus=1))
        self.cluster.wait_for_nodes()


def kill(
    victim: Victim, name: str, seed: int, latest: float, reference: Reference, folder: Path, cluster: Cluster | None
) -> dict[str, Any]:
    """One kill and what came of it; a row of the table. `latest`: moment, as a share of the reference's time."""
    draw = random.Random(f"{victim} {seed}")
    more: Sequence[str] = ()
    if victim == "node":
        assert cluster is not None
        cluster.mend()
        more = [f"resources.address={cluster.cluster.address}"]
    if name == "TERM" and victim == "worker":
        more = ["resources.retries=0"]  # who is told to go spends none
    sweep = Sweep(folder, *more)
    sweep.start()
    sweep.until_running()
    started, moment = time.monotonic(), draw.uniform(0, latest) * reference.seconds
    time.sleep(moment)
    assert sweep.process is not None
    targets: list[Any] = []
    while sweep.process.poll() is None and not (sweep.running() and targets):  # a kill is to interrupt work
        targets = cluster.training() if victim == "node" and cluster else training(sweep.processes())
        time.sleep(0.01)
    finished, running = sweep.finished(), sweep.running()
    epochs = {trial: sweep.epoch(trial) for trial in running}
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"victim": victim, "signal": name, "seed": seed, "moment_seconds": round(time.monotonic() - started, 2)}
    row |= {"running": len(running)}
    problems = [] if running and targets else ["nothing was running"]
    if victim == "driver":
        killed, left = time.monotonic(), sweep.processes()
        sweep.process.send_signal(signal.Signals[f"SIG{name}"])
        code = sweep.process.wait()
        if name == "TERM" and (code != 143 or time.monotonic() - killed > TERMINATED_SECONDS):
            problems.append(f"exit code {code} after {time.monotonic() - killed:.1f} s")
        killed = time.monotonic()
        while (
            left := {p for p in left | sweep.processes() if lives(p)}
        ) and time.monotonic() - killed < ORPHANS_SECONDS:
            time.sleep(0.2)
        row["orphans_after_seconds"] = round(time.monotonic() - killed, 1)
        problems += [f"process {p.pid} is left: {' '.join(command_of(p))[:100]}" for p in left]
        finished = sweep.finished()  # a trial at its last step may have ended before it was told to
        sweep.start()
    elif targets and victim == "worker":
        draw.choice(targets).send_signal(signal.Signals[f"SIG{name}"])
    elif targets and cluster:
        cluster.kill(draw.choice(targets))
    code, said = sweep.wait()
    row["exit_code"] = code
    problems += [f"exit code {code}: {said}"] if code else []
    if victim != "driver" and "goes on from its last checkpoint" not in sweep.said.read_text():
        problems.append("no trial was placed again")
    row["finished"] = len(finished)
    found = {record["id"]: record for record in sweep.run.trials()}
    lost = []
    for trial in running:
        again = found.get(trial, {}).get("continued", [])
        if again or (victim == "driver" and trial not in finished):
            lost.append(max(0.0, epochs[trial] - (again[-1]["epoch"] if again else 0.0)))
    row["continued"] = sum("continued" in record for record in found.values())
    row["lost_epochs"] = max(lost, default="")
    problems += [f"{max(lost):g} epochs lost"] if lost and max(lost) > 1 else []
    row["equal"] = outcome(sweep.run) == reference.outcome
    problems += [] if row["equal"] else ["another outcome"]
    row["ran_again"] = sum(sweep.finished().get(trial) != before for trial, before in finished.items())
    problems += ["a finished trial ran again"] if row["ran_again"] else []
    row["problems"] = "; ".join(problems)
    return row


if __name__ == "__main__":
    sys.exit(cli.run(Kills, main, __doc__ or ""))
