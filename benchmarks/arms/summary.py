"""Summarises the rounds of benchmarks/training.py: ratios, accuracies, and model FLOPs utilisation (MFU)."""

import time
from typing import TYPE_CHECKING

from harness.run.storage import Json

if TYPE_CHECKING:
    import pandas


def matrix_product_rates() -> dict[str, float]:
    """Peak FLOP/s of matrix products on the first device by precision: the best of many products of several sizes.

    On CPU the higher of all threads at once, and one thread times their number, as trials may use either. tf32: float32
    matrices on CUDA, as PyTorch's convolutions compute by default; float32 is full float32 there too.
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


def summarize_arms(rows: list[Json], flop: dict[str, float], rates: dict[str, float]) -> "pandas.DataFrame":
    """One row per arm: medians, ratio of trials per hour to the plain arm's paired by round, change in accuracy."""
    import pandas as pd

    from harness.stats.intervals import mean_interval, ratio_interval, welch

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
            **{f"val_accuracy_{k}": v for k, v in vars(mean_interval(accuracy)).items()},
        }
        reference = table[table["arm"] == "plain"]
        if arm != "plain" and len(reference):
            ratio = ratio_interval(own["trials_per_hour"].tolist(), reference["trials_per_hour"].tolist())
            row |= {f"ratio{k}": v for k, v in (("", ratio.mean), ("_low", ratio.low), ("_high", ratio.high))}
            baseline = [a for values in reference["val_accuracy"] for a in values]
            change = welch(accuracy, baseline).interval_at()
            row |= {f"accuracy_change_{k}": v for k, v in vars(change).items() if k != "n"}
        summary.append(row)
    return pd.DataFrame(summary)
