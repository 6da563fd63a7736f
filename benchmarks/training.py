"""python -m benchmarks.training [key=value ...]: finished trials per hour, against what people write today.

Arms take turns in one sitting, each a whole command in a fresh process, the clock around all of it: start-up, data,
compilation, training, validation, files. `plain`: a PyTorch loop with DataLoader; `ray_tutorial`: the same inside Ray
Tune as PyTorch's tutorial has it; `harness`: python -m harness.tune. All train the same network on the same images with
the same batch size, epochs, SGD and validations, no early stop. Every command counts, the first too; only decoding the
images comes before, and what earlier commands compiled is in the cache. `harness_N`: N trials share the device, its
cores or its one GPU; there is never more than one. MFU: model FLOPs over the rate of matrix products in the precision
of an arm, measured here; that of a plain script on a GPU is TF32, which PyTorch's convolutions use by default.

    python -m benchmarks.training architecture=baseline data.name=images data.root=DIR out=RESULTS
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from harness import cli, results
from harness.config import Data, Strict, Trial, plugin

if TYPE_CHECKING:
    import pandas

    from harness.progress import Progress

TOP = Path(__file__).parent.parent
Arm = Literal["plain", "ray_tutorial", "harness", "harness_1", "harness_2", "harness_4", "harness_8"]


class Training(Strict):
    architecture: str = plugin("architectures", "baseline")
    arms: list[Arm] = Field(["plain", "ray_tutorial", "harness"], min_length=1, description="in turn, order changing")
    rounds: int = Field(3, ge=2, description="measured commands of each arm")
    trials: int = Field(4, ge=1, description="a command trains, with different seeds")
    epochs: int = Field(3, ge=1, description="of each trial")
    batch_size: int = Field(64, ge=1, description="images a step")
    lr: float = Field(5e-2, gt=0, description="of SGD")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the harness's arm")
    compile: Literal["auto", "off", "kernels", "captured-eager", "default", "captured"] = Field(
        "auto", description="of the harness's arm: trial.compile"
    )
    loader_workers: int = Field(2, ge=0, description="of the plain arm's DataLoader")
    data: Data = Data()
    out: Path = Field(Path("training-benchmark"), description="folder for rounds.csv, summary.csv, settings.json")


class Request(Strict):
    """What an arm is to train."""

    trial: Trial
    data: Data
    seeds: list[int]
    num_classes: int
    input_size: int
    loader_workers: int


class Watch(threading.Thread):
    """Peak memory of a process and all that it started, in bytes: the proportional share of what they hold. Of the GPU
    what all processes together take more than at the beginning."""

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
            if turn % 4:  # what follows takes a while
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


def run_arm(arm: str, request: Request, log: Path) -> dict[str, Any]:
    """One command of an arm, from its start to its end; the row for rounds.csv."""
    folder = Path(tempfile.mkdtemp(prefix="training-"))
    ours = arm.startswith("harness")
    if ours:
        own = results.flatten(request.trial.model_dump(mode="json", exclude_defaults=True), keep_lists=True)
        rates = f"{{'optimizer.lr': Choice([{request.trial.optimizer.lr}])}}"  # so that samples differ by seed alone
        (folder / "space.py").write_text(
            f"from tune_spaces import Choice, Space\n\nSPACE = Space(trial={own!r}, parameters={rates})\n"
        )
        data = results.flatten(request.data.model_dump(mode="json", exclude_none=True), "data.")
        command = ["-m", "harness.tune", f"space={folder / 'space.py'}", f"run={folder / 'run'}", "stages=[search]"]
        command += [f"search.samples={len(request.seeds)}", f"search.seed={request.seeds[0]}"]
        command += [f"{name}={value}" for name, value in data.items()] + share(arm)
    else:
        command = ["-m", f"benchmarks.arms.{arm}", request.model_dump_json()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one device, as a plain script has
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    started, first, trials = time.perf_counter(), 0.0, []
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
            if not ours and '{"' in line:  # after the worker's name, where Ray hands its output on
                first = first or time.perf_counter() - started
                told = json.JSONDecoder().raw_decode(line[line.index('{"') :])[0]
                trials += [told["trial"]] if "trial" in told else []
        code = process.wait()
    seconds = time.perf_counter() - started
    watch.done.set()
    plans: dict[str, Any] = {}
    ledger: dict[str, float] = {}  # seconds of all workers together
    if ours and code == 0:
        run = results.RunDirectory(folder / "run")
        plans = (run.configuration() or {})["plans"]
        for record in run.trials():
            timing, metrics = record["timing"], record["metrics"]
            images = timing["images_per_second"] * timing["train_seconds"]
            trials.append({"images": images, **metrics, **timing, **record["environment"]})
            for kind, spent in timing["ledger"].items():
                ledger[kind] = round(ledger.get(kind, 0.0) + spent, 3)
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
        "plans": plans,
        "ledger": ledger,
    }


def share(arm: str) -> list[str]:
    """Keys that give a trial of `harness_N` its part of the device."""
    import torch

    if "_" not in arm:
        return []
    count = int(arm.split("_")[1])
    if torch.cuda.is_available():
        return [f"resources.gpus_per_trial={1 / count}"]
    return [f"resources.cpus_per_trial={max(1, results.environment()['cores'] // count)}"]


def trials_at_once(arm: str, trials: list[dict[str, Any]]) -> int:
    """How many trials trained side by side; the tutorial gives each two CPUs, a plain script trains one by one."""
    if arm == "ray_tutorial" and not trials[0].get("cuda"):
        return max(1, min(len(trials), results.environment()["cores"] // 2))
    if not arm.startswith("harness"):
        return 1
    by_cores = max(1, min(len(trials), trials[0]["cores"] // trials[0]["threads"]))
    if trials[0]["device"] == "cuda":
        return min(by_cores, int(arm.split("_")[1]) if "_" in arm else 1)
    return by_cores


def matrix_product_rates() -> dict[str, float]:
    """FLOP/s of matrix products on the first device by precision: the best of many, of several sizes.

    On CPU with all threads at once or with one, times the cores: whichever is more, as trials may use either. tf32: of
    float32 numbers on CUDA, as PyTorch's convolutions compute by default; float32 is float32 there too.
    """
    import torch

    cuda = torch.cuda.is_available()
    device, threads = torch.device("cuda" if cuda else "cpu"), torch.get_num_threads()
    rates = {}
    for name in ("float32", "tf32", "bfloat16", "float16") if cuda else ("float32", "bfloat16"):
        rates[name] = 0.0
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        kind = torch.float32 if name == "tf32" else getattr(torch, name)
        for side, count in [(8192, 1)] if cuda else [(s, n) for s in (512, 1024, 2048) for n in (1, threads)]:
            torch.set_num_threads(count)
            a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
            for _ in range(max(10, 2 * 2048 // side)):
                started = time.perf_counter()
                a @ b
                if cuda:
                    torch.cuda.synchronize()
                rate = 2 * side**3 / (time.perf_counter() - started)
                rates[name] = max(rates[name], rate * (1 if cuda else threads / count))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(threads)
    return rates


def summarize(rows: list[dict[str, Any]], flop: dict[str, float], rates: dict[str, float]) -> "pandas.DataFrame":
    """A row an arm: medians, ratio of trials per hour to the plain arm's round by round, accuracy against plain's."""
    import pandas as pd

    from harness import stats

    table = pd.DataFrame(rows)
    summary = []
    for arm, own in table.groupby("arm", sort=False):
        accuracy = [a for values in own["val_accuracy"] for a in values]
        peak = rates[own["precision"].iloc[0]]
        step = float(own["step_images_per_second"].median())
        hourly = float(own["trials_per_hour"].median())
        row = {
            "arm": arm,
            "trials_per_hour": hourly,
            "step_images_per_second": step,
            "first_result_seconds": float(own["first_result_seconds"].median()),
            "peak_gib": float(own["peak_bytes"].max()) / 2**30,
            "peak_device_gib": float(own["peak_device_bytes"].max()) / 2**30,
            "precision": own["precision"].iloc[0],
            "plan": own["plan"].iloc[0],
            "mfu_step": step * flop["training"] / peak,
            "mfu_trial": hourly / 3600 * flop["trial"] / peak,
            "mfu_step_of_bfloat16": step * flop["training"] / rates["bfloat16"],
            "rounds": len(own),
            **{f"val_accuracy_{k}": v for k, v in vars(stats.mean_interval(accuracy)).items()},
        }
        reference = table[table["arm"] == "plain"]
        if arm != "plain" and len(reference):
            ratio = stats.ratio_interval(own["trials_per_hour"].tolist(), reference["trials_per_hour"].tolist())
            row |= {f"ratio{k}": v for k, v in (("", ratio.mean), ("_low", ratio.low), ("_high", ratio.high))}
            baseline = [a for values in reference["val_accuracy"] for a in values]
            change = stats.difference_interval(
                dict(enumerate(accuracy)), dict(enumerate(baseline, len(accuracy)))
            )  # unpaired
            row |= {f"accuracy_change_{k}": v for k, v in vars(change).items() if k != "n"}
        summary.append(row)
    return pd.DataFrame(summary)


def main(config: Training) -> int:
    import random

    from architectures._summary import summarize as count
    from harness import datasets, plugins
    from harness.progress import Progress

    progress = Progress()
    config.out.mkdir(parents=True, exist_ok=True)
    with progress.live():
        data = datasets.load(config.data, progress.counter("decoding images"))
        trial = Trial.model_validate(
            {"architecture": config.architecture, "epochs": config.epochs, "batch_size": config.batch_size}
            | {"precision": config.precision, "compile": config.compile, "optimizer": {"name": "sgd", "lr": config.lr}}
        )
        macs = count(plugins.build_network(trial, len(data.classes), data.input_size), data.input_size)
        steps = len(data.train) // config.batch_size
        flop = {"training": 6.0 * macs.macs}  # forward, and about twice as much backward
        validated = min(2, steps) * len(data.validation)
        flop["trial"] = config.epochs * (steps * config.batch_size * flop["training"] + validated * 2.0 * macs.macs)
        rates = matrix_product_rates()
        rows: list[dict[str, Any]] = []
        order = random.Random(0)
        for number in range(config.rounds):
            arms = order.sample(config.arms, len(config.arms))
            for arm in arms:
                progress.status(f"round {number + 1} of {config.rounds}: {arm}")
                seeds = [1000 * (number + 1) + i for i in range(config.trials)]
                request = Request(
                    trial=trial,
                    data=config.data,
                    seeds=seeds,
                    num_classes=len(data.classes),
                    input_size=data.input_size,
                    loader_workers=config.loader_workers,
                )
                row = run_arm(arm, request, config.out / "arms.log")
                progress.line(
                    f"round {number + 1}: {arm}: {row['seconds']:.1f} s, "
                    f"{row['trials_per_hour']:.1f} trials/h, {row['step_images_per_second']:,.0f} images/s in the step"
                )
                rows.append({"round": number, **row})
                _write(config, progress, rows, flop, rates)
    return 0


def _write(
    config: Training,
    progress: "Progress",
    rows: list[dict[str, Any]],
    flop: dict[str, float],
    rates: dict[str, float],
) -> None:
    """Results as far as they are, after each command."""
    from harness import checkpoint

    flat = [{k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows]
    checkpoint.write_atomically(config.out / "rounds.csv", results.csv_text(flat[0], flat))
    settings = config.model_dump(mode="json", exclude={"out": True, "data": {"root"}})
    described = {"settings": settings, "flop": flop, "matrix_product_flop_per_second": rates}
    checkpoint.write_json(config.out / "settings.json", described | {"environment": results.environment()})
    if len(rows) < config.rounds * len(config.arms):
        return
    summary = summarize(rows, flop, rates)
    checkpoint.write_atomically(config.out / "summary.csv", summary.to_csv(index=False))
    for row in summary.to_dict("records"):
        text = f"{row['arm']}: {row['trials_per_hour']:.1f} trials/h, validation {row['val_accuracy_mean']:.4f}"
        if not math.isnan(row.get("ratio", math.nan)):
            text += f", {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] times plain"
        progress.line(text)


if __name__ == "__main__":
    sys.exit(cli.run(Training, main, __doc__ or ""))
