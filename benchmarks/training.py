"""python -m benchmarks.training [key=value ...]: finished trials per hour, against typical training scripts.

Arms are interleaved in one sitting, each a complete command in a fresh process, timed as a whole: start-up, data,
compilation, training, validation, files. `plain`: a PyTorch loop with DataLoader; `ray_tutorial`: the same inside Ray
Tune, as in PyTorch's tutorial; `harness`: python -m harness.tune. All train the same network on the same images with
the same batch size, epochs, SGD and validations, without early stopping. Every command counts, including the first;
only the images are decoded beforehand, and code compiled by earlier commands is cached. `harness_N`: N trials share the
device: its cores, or one GPU (never more). MFU: model FLOPs over the rate of matrix products in the arm's precision,
measured here; the precision of a plain script on a GPU is TF32, the default of PyTorch's convolutions.

    python -m benchmarks.training architecture=baseline data.name=images data.root=DIR out=RESULTS
"""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from benchmarks.arms.measure import ArmRequest, run_arm
from benchmarks.arms.summary import matrix_product_rates, summarize_arms
from harness.config import Data, Strict, Trial, command_line, plugin_field
from harness.run import storage, system
from harness.run.storage import Json
from harness.run.tables import csv_text

if TYPE_CHECKING:
    from harness.run.progress import Progress

ArmName = Literal["plain", "ray_tutorial", "harness", "harness_1", "harness_2", "harness_4", "harness_8"]


class Training(Strict):
    architecture: str = plugin_field("architectures", "baseline")
    arms: list[ArmName] = Field(
        ["plain", "ray_tutorial", "harness"], min_length=1, description="arms, in a new random order each round"
    )
    rounds: int = Field(3, ge=2, description="measured commands of each arm")
    trials: int = Field(4, ge=1, description="trials per command, with different seeds")
    epochs: int = Field(3, ge=1, description="epochs of each trial")
    batch_size: int = Field(64, ge=1, description="images per step")
    lr: float = Field(5e-2, gt=0, description="learning rate of SGD")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="trial.precision of harness arms"
    )
    compile: Literal["auto", "off", "kernels", "captured-eager", "default", "captured"] = Field(
        "auto", description="trial.compile of harness arms"
    )
    loader_workers: int = Field(2, ge=0, description="workers of the plain arm's DataLoader")
    data: Data = Data()
    out: Path = Field(Path("training-benchmark"), description="folder for rounds.csv, summary.csv, settings.json")


def main(config: Training) -> int:
    import random

    from harness.data.dataset import load_dataset
    from harness.run.progress import Progress
    from harness.training.network import build_network
    from harness.training.network import summarize_network as count

    progress = Progress()
    with progress.live():
        data = load_dataset(config.data, progress.counter("decoding images"))
        trial = Trial.model_validate(
            {"architecture": config.architecture, "epochs": config.epochs, "batch_size": config.batch_size}
            | {"precision": config.precision, "compile": config.compile, "optimizer": {"name": "sgd", "lr": config.lr}}
        )
        macs = count(build_network(trial, len(data.classes), data.input_size), data.input_size)
        steps = len(data.train) // config.batch_size
        flop = {"training": 6.0 * macs.macs}  # forward, and about twice as much backward
        validated = min(2, steps) * len(data.validation)
        flop["trial"] = config.epochs * (steps * config.batch_size * flop["training"] + validated * 2.0 * macs.macs)
        config.out.mkdir(parents=True, exist_ok=True)
        rates = matrix_product_rates()
        rows: list[Json] = []
        order = random.Random(0)
        for number in range(config.rounds):
            arms = order.sample(config.arms, len(config.arms))
            for arm in arms:
                progress.status(f"round {number + 1} of {config.rounds}: {arm}")
                seeds = [1000 * (number + 1) + i for i in range(config.trials)]
                request = ArmRequest(
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
    rows: list[Json],
    flop: dict[str, float],
    rates: dict[str, float],
) -> None:
    """Write the results so far, after each command; the summary after the last."""

    flat = [{k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows]
    storage.write_atomically(config.out / "rounds.csv", csv_text(flat[0], flat))
    settings = config.model_dump(mode="json", exclude={"out": True, "data": {"root"}})
    described = {"settings": settings, "flop": flop, "matrix_product_flop_per_second": rates}
    storage.write_json(config.out / "settings.json", described | {"environment": system.environment().to_json()})
    if len(rows) < config.rounds * len(config.arms):
        return
    summary = summarize_arms(rows, flop, rates)
    storage.write_atomically(config.out / "summary.csv", summary.to_csv(index=False))
    for row in summary.to_dict("records"):
        text = f"{row['arm']}: {row['trials_per_hour']:.1f} trials/h, validation {row['val_accuracy_mean']:.4f}"
        if not math.isnan(row.get("ratio", math.nan)):
            text += f", {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] times plain"
        progress.line(text)


if __name__ == "__main__":
    sys.exit(command_line.run_command(Training, main, __doc__ or ""))
