"""python -m benchmarks.plans [key=value ...]: is the plan of trial.plan=auto the fastest, and what did choosing cost?

For each architecture, in a fresh process with an empty cache: first times the harness's choice as a whole, then times
every candidate again, interleaved and for longer. `first_seconds` is what a candidate took until it could be timed: the
chosen one's is not a cost of choosing, as a trial would spend it anyway. Nothing else should run at the same time.

    python -m benchmarks.plans precision=float32 out=RESULTS/plans.csv
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from pydantic import Field

from harness.config import Strict, Trial, command_line, plugins
from harness.run.storage import Json
from harness.run.tables import write_measured

COLUMNS = (
    *("architecture", "device", "precision", "threads", "plan", "images_per_second", "rounds", "chosen"),
    *("of_the_best", "planned_seconds", "choosing_seconds", "first_seconds", "left_out"),
)


class Plans(Strict):
    architectures: list[str] = Field(
        plugins.names("architectures"), min_length=1, description="measured with their default options"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="as trial.precision")
    threads: int = Field(1, ge=1, description="CPU threads of the process: 1 as where trials share the cores")
    images: int = Field(450_000, ge=1, description="images that one allocation trains on: ten epochs of CIFAR-10")
    rounds: int = Field(10, ge=3, description="rounds of each candidate, at least 0.1 s each")
    out: Path = Field(Path("plans.csv"), description="table to write")


def measure(name: str, config: Json) -> list[Json]:
    """Rows of the table for one architecture."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"HARNESS_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/compiled"}
        import torch

        from harness.data.batches import pick_device
        from harness.stats.intervals import ratio_interval
        from harness.training import autotuner, execution

        settings = Plans.model_validate(config)
        device = pick_device("auto")
        torch.set_num_threads(settings.threads)
        execution.prepare_process(settings.threads)
        trial = Trial(architecture=name, precision=settings.precision)
        started = time.perf_counter()
        choice = autotuner.choose_plan(trial, 10, 32, device, settings.images)
        seconds = time.perf_counter() - started
        present = {}
        for plan in autotuner.candidate_plans(trial, device):
            try:
                one = autotuner.TimedPlan(plan, trial, 10, 32, device)
                one.gradients()
            except Exception as error:
                choice.left_out[plan.name] = str(error).splitlines()[0]
                continue
            present[plan.name] = one
        for _ in range(settings.rounds):
            for one in present.values():
                one.time_round()
        chosen = f"{choice.compile} {choice.memory_format}"
        best = min(present.values(), key=lambda one: one.seconds())
        return [
            {
                "architecture": name,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "precision": choice.precision,
                "threads": settings.threads,
                "plan": plan_name,
                "images_per_second": trial.batch_size / one.seconds(),
                "rounds": len(one.rounds),
                "chosen": plan_name == chosen,
                "of_the_best": ratio_interval(best.rounds, one.rounds).mean,
                "planned_seconds": settings.images * present[chosen].seconds() / trial.batch_size,
                "choosing_seconds": seconds,
                "first_seconds": choice.first_seconds.get(plan_name, ""),
                "left_out": choice.left_out.get(plan_name, ""),
            }
            for plan_name, one in present.items()
        ]


def main(config: Plans) -> int:
    from harness.run.progress import Progress

    progress = Progress()
    rows: list[Json] = []
    with progress.live():
        for name in config.architectures:
            progress.status(f"measuring {name}")
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                own = process.submit(measure, name, config.model_dump(mode="json")).result()
            rows += own
            write_measured(config.out, COLUMNS, rows)
            chosen = next(row for row in own if row["chosen"])
            speeds = ", ".join(f"{row['plan']} {row['images_per_second']:,.0f}" for row in own)
            start = f"{chosen['first_seconds']:.1f} of them the start-up of the chosen plan"
            cost = f"{chosen['choosing_seconds']:.1f} s to choose, {start}, "
            cost += f"for {chosen['planned_seconds']:,.0f} s of training"
            progress.line(
                f"{name}: {chosen['plan']}, {chosen['of_the_best']:.3f} of the best; {cost}; images/s: {speeds}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_command(Plans, main, __doc__ or ""))
