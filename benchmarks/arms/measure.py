"""Runs one command of an arm of benchmarks/training.py in a fresh process and times it as a whole."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from harness.config import Data, Strict, Trial
from harness.config.keys import flatten
from harness.config.plugins import TOP
from harness.run import system
from harness.run.directory import RunDirectory
from harness.run.storage import Json


class ArmRequest(Strict):
    """The trials that an arm trains, one per seed."""

    trial: Trial
    data: Data
    seeds: list[int]
    num_classes: int
    input_size: int
    loader_workers: int


class Watch(threading.Thread):
    """Samples peak memory in bytes: of a process and its descendants their proportional set size (PSS), of the GPU what
    all processes together use beyond the initial use."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self.peak_device, self.done = pid, 0, 0, threading.Event()

    def run(self) -> None:
        import psutil
        import torch

        cuda = torch.cuda.is_available()
        free = torch.cuda.mem_get_info()[0] if cuda else 0
        turn = 0
        while not self.done.wait(0.5):
            if cuda:
                self.peak_device = max(self.peak_device, free - torch.cuda.mem_get_info()[0])
            turn += 1
            if turn % 4:  # reading PSS is slow
                continue
            total = 0
            try:
                root = psutil.Process(self.pid)
                for process in [root, *root.children(recursive=True)]:
                    try:
                        total += process.memory_full_info().pss
                    except psutil.Error:
                        continue
            except psutil.Error:
                return
            self.peak = max(self.peak, total)


def run_arm(arm: str, request: ArmRequest, log: Path) -> Json:
    """Run one command of an arm; returns its row of rounds.csv. Raises RuntimeError where it fails or lacks trials."""
    folder = Path(tempfile.mkdtemp(prefix="training-"))
    ours = arm.startswith("harness")
    command = harness_command(arm, request, folder) if ours else other_command(arm, request)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one device, as in a plain script
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    started, first, trials = time.perf_counter(), 0.0, list[Json]()
    with log.open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=TOP, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        watch = Watch(process.pid)
        watch.start()
        if ours:
            histories = folder / "run" / "trials"
            while process.poll() is None and not first:
                if any(histories.glob("*/history.csv")):
                    first = time.perf_counter() - started
                time.sleep(0.05)
        assert process.stdout is not None
        for line in process.stdout:
            errors.write(line)
            if not ours and '{"' in line:  # Ray puts the worker's name before its output
                first = first or time.perf_counter() - started
                told = json.JSONDecoder().raw_decode(line[line.index('{"') :])[0]
                trials += [told["trial"]] if "trial" in told else []
        code = process.wait()
    seconds = time.perf_counter() - started
    watch.done.set()
    own: Json = {"plans": {}, "ledger": {}}
    if ours and code == 0:
        trials, own = harness_trials(RunDirectory(folder / "run"))
    shutil.rmtree(folder, ignore_errors=True)
    if code != 0 or len(trials) != len(request.seeds):
        raise RuntimeError(f"arm {arm} ended with exit code {code} and {len(trials)} trials; see {log}")
    at_once = trials_at_once(arm, trials)
    return {
        "arm": arm,
        "seconds": seconds,
        "trials": len(trials),
        "trials_per_hour": 3600 * len(trials) / seconds,
        "at_once": at_once,
        "step_images_per_second": at_once * sum(t["images"] for t in trials) / sum(t["train_seconds"] for t in trials),
        "first_result_seconds": first,
        "peak_bytes": watch.peak,
        "peak_device_bytes": watch.peak_device,
        "val_accuracy": [t["val_accuracy"] for t in trials],
        "precision": trials[0]["precision"],
        "plan": " ".join(str(trials[0].get(part, "")) for part in ("compile", "memory_format", "threads")).strip(),
        **own,
    }


def harness_command(arm: str, request: ArmRequest, folder: Path) -> list[str]:
    """Arguments of Python for harness.tune with the request's trials: samples that differ only in their seed."""
    own = flatten(request.trial.model_dump(mode="json", exclude_defaults=True), keep_lists=True)
    rates = f"{{'optimizer.lr': Choice([{request.trial.optimizer.lr}])}}"
    (folder / "space.py").write_text(
        f"from tune_spaces import Choice, Space\n\nSPACE = Space(trial={own!r}, parameters={rates})\n"
    )
    data = flatten(request.data.model_dump(mode="json", exclude_none=True), "data.")
    command = ["-m", "harness.tune", f"space={folder / 'space.py'}", f"run={folder / 'run'}", "stages=[search]"]
    command += [f"search.samples={len(request.seeds)}", f"search.seed={request.seeds[0]}"]
    return command + [f"{name}={value}" for name, value in data.items()] + share_of_device(arm)


def other_command(arm: str, request: ArmRequest) -> list[str]:
    return ["-m", f"benchmarks.arms.{arm}", request.model_dump_json()]


def harness_trials(run: RunDirectory) -> tuple[list[Json], Json]:
    """(figures of each trial; the execution plans, and seconds by kind of work summed over trials)"""
    trials, ledger = list[Json](), dict[str, float]()
    for record in run.trials():
        timing = record.timing
        images = timing.images_per_second * timing.train_seconds
        figures = record.metrics.to_json() | timing.to_json() | record.environment.to_json()
        trials.append({"images": images} | figures)
        for kind, spent in timing.ledger.items():
            ledger[kind] = round(ledger.get(kind, 0.0) + spent, 3)
    plans = {name: plan.to_json() for name, plan in run.recorded().plans.items()}
    return trials, {"plans": plans, "ledger": ledger}


def share_of_device(arm: str) -> list[str]:
    """Arguments that give each trial of `harness_N` its share of the device."""
    import torch

    if "_" not in arm:
        return []
    count = int(arm.split("_")[1])
    if torch.cuda.is_available():
        return [f"resources.gpus_per_trial={1 / count}"]
    return [f"resources.cpus_per_trial={max(1, system.environment().cores // count)}"]


def trials_at_once(arm: str, trials: list[Json]) -> int:
    """Number of concurrent trials; the tutorial gives each trial two CPUs, a plain script trains one by one."""
    if arm == "ray_tutorial" and not trials[0].get("cuda"):
        return max(1, min(len(trials), system.environment().cores // 2))
    if not arm.startswith("harness"):
        return 1
    by_cores = max(1, min(len(trials), trials[0]["cores"] // trials[0]["threads"]))
    if trials[0]["device"] == "cuda":
        return min(by_cores, int(arm.split("_")[1]) if "_" in arm else 1)
    return by_cores
