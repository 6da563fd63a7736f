"""Sweeps of small trials for benchmarks/kills.py and soak.py, and their outcome, which no kill may change."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.run.directory import RunDirectory
from harness.run.records import HISTORY_FILE, TRIAL_FILE
from harness.run.storage import Json

SWEEP = (
    *("space=quick", "stages=[search]", "search.samples=4", "trial.epochs=16", "trial.options.widths=[[4,8],[8,8]]"),
    *("trial.validations_per_epoch=4", "trial.checkpoint_seconds=0", "trial.compile=off", "resources.cpus_per_trial=1"),
)
MARK = "HARNESS_KILLS"  # environment variable that marks all processes of a sweep


@dataclass(frozen=True)
class Reference:
    """Outcome and duration of an uninterrupted sweep."""

    outcome: Json
    seconds: float  # from its first trial's start to its end

    @classmethod
    def of(cls, folder: Path) -> "Reference":
        sweep = Sweep(folder)
        sweep.start()
        sweep.until_running()
        started = time.monotonic()
        code, said = sweep.wait()
        if code:
            raise RuntimeError(f"the uninterrupted sweep fails: {said}")
        return cls(outcome(sweep.run), time.monotonic() - started)


def outcome(run: RunDirectory) -> Json:
    """Results that must not depend on interruptions, by trial."""
    found = {}
    for record in run.trials():
        history = (run.trial_folder(record.id) / HISTORY_FILE).read_text().splitlines()
        curve = [line.rsplit(",", 1)[0] for line in history]  # the last column is the time
        found[record.id] = (record.status, record.metrics.to_json(), record.weights_sha256, curve)
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
        """Wait for the end of the sweep; returns (exit code, last line of its output)."""
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
        """Trials that have validated at least once and not ended."""
        folders = {path.parent for path in self.run.path.glob(f"trials/*/{HISTORY_FILE}")}
        return sorted(f.name for f in folders if not (f / TRIAL_FILE).exists())

    def finished(self) -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in self.run.path.glob(f"trials/*/{TRIAL_FILE}")}

    def epoch(self, trial: str) -> float:
        """Epoch of the trial's last validation; 0 if there was none."""
        with contextlib.suppress(OSError):
            last = (self.run.trial_folder(trial) / HISTORY_FILE).read_text().splitlines()[-1]
            if last[0].isdigit():
                return float(last.split(",")[0])
        return 0.0

    def processes(self) -> set[psutil.Process]:
        """Live processes that the command started: its descendants, and those with its mark whatever their parent.

        Ray's workers overwrite their environment, and with it the mark, by their process title.
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


def training_workers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Workers that are training a trial, recognised by the process title that Ray sets."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline()).strip()
            if title.startswith("ray::") and title.endswith(".train"):
                found.append(process)
    return found


class KillableCluster:
    """A Ray cluster on this machine: a head without CPUs, and two nodes of one CPU each that run all trials."""

    def __init__(self, cluster: Any):
        self.cluster = cluster
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    @classmethod
    @contextlib.contextmanager
    def of_three(cls) -> "Iterator[KillableCluster]":
        from ray.cluster_utils import Cluster as Nodes

        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            yield cls(nodes)
        finally:
            nodes.shutdown()

    def training(self) -> list[Any]:
        """Nodes with a worker that is training a trial."""
        return [n for n in self.nodes if training_workers(psutil.Process(self.raylet(n)).children(recursive=True))]

    @staticmethod
    def raylet(node: Any) -> int:
        return node.all_processes["raylet"][0].process.pid

    def kill(self, node: Any) -> None:
        """Kill all processes of a node at once, as when a machine fails."""
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
