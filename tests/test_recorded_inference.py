"""The recorded inference tables, judged by the present rules: docs/evidence.md has what that gives."""

import math

import numpy as np
import pandas as pd
import pytest
from conftest import TOP
from scipy.stats import t

from benchmarks.inference.sitting import AGAIN, REFERENCE
from benchmarks.inference.summary import compare_arms
from benchmarks.inference.verdict import decide
from harness.config import Benchmark

RESULTS = TOP / "benchmarks" / "results"
SITTINGS = sorted(path.parent for path in RESULTS.glob("inference*/*/verdict.json"))
IMAGES = 10_000


def tables(folder):
    """(summary, rounds); the numbers of lost and gained images follow from the recorded t-interval of the change."""
    rounds = pd.read_csv(folder / "inference.csv", dtype={"call_ms": str})
    summary = pd.read_csv(folder / "inference_summary.csv").query("ratio.notna()", engine="python")
    half = (summary["accuracy_change_high"] - summary["accuracy_change_low"]) / 2
    variance = (half * math.sqrt(IMAGES) / t.ppf(0.975, IMAGES - 1)) ** 2
    change = summary["accuracy_change_mean"]
    disagreeing = np.rint(variance * (IMAGES - 1) + IMAGES * change**2)
    net = np.rint(IMAGES * change)
    return summary.assign(
        lost=(disagreeing - net) / 2,
        gained=(disagreeing + net) / 2,
        images=IMAGES,
        accuracy_gate=np.where(summary["precision"] == "float32", "exact", ""),
        accuracy_low=summary["accuracy"],
        accuracy_high=summary["accuracy"],
        scope="host arrays",
        note=summary["note"].fillna(""),
    ), rounds.assign(scope="host arrays")


def ratio(rounds, name):
    compared = compare_arms(rounds)
    found = compared.difference(name, REFERENCE).interval_at(1 - 0.05 / (len(compared.values) - 1))
    return "{:.2f} [{:.2f}, {:.2f}]".format(*(math.exp(v) for v in (found.mean, found.low, found.high)))


@pytest.mark.parametrize("folder", SITTINGS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_what_is_recommended(folder):
    """The int8 file in onnxruntime at each batch size, tied with none; its ratio is in the page's table."""
    summary, rounds = tables(folder)
    page, cells = (TOP / "docs" / "evidence.md").read_text(), []
    for size in sorted(summary["batch_size"].unique().astype(int)):
        settings = Benchmark(batch_sizes=[size], batch_size=size)
        told = decide(summary, rounds, settings, REFERENCE, AGAIN)
        assert (told.ship["backend"], told.tied, told.reservation) == ("onnxruntime int8", [], "")
        cells.append(ratio(rounds[rounds["batch_size"] == size], "onnxruntime int8"))
    assert f"| `{folder.relative_to(RESULTS)}` | {' | '.join(cells)} |" in page, cells
