"""What the benchmark recommends, and the rate under a latency, from measurements made up here."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import parity

from benchmarks.inference import verdict
from benchmarks.inference.sitting import AGAIN, REFERENCE, highest_rate
from harness.config import Benchmark


def summary_of(speeds, changes=None, replicates=5):
    """Speeds by arm, with one percent of noise, at batch size 64."""
    generator = np.random.default_rng(0)
    arms = [
        SimpleNamespace(
            name=name,
            check=SimpleNamespace(artifact=SimpleNamespace(label=f"x/{name}.onnx"), device="cpu"),
            precision="float32",
            note="",
            accuracy=parity((changes or {}).get(name, 0.0)),
        )
        for name in speeds
    ]
    rows = []
    for replicate in range(replicates):
        for turn in range(3):
            for name, speed in {**speeds, AGAIN: speeds[REFERENCE]}.items():
                seconds = 64 / speed * float(np.exp(generator.normal(0, 0.01)))
                rows.append(
                    {"backend": name, "scope": "host arrays", "batch_size": 64, "replicate": replicate, "round": turn}
                    | {"images": 64, "seconds": seconds, "call_ms": f"{1000 * seconds:.4g}", "event_ms": ""}
                    | {"foreign_cores": 0.0, "note": ""}
                )
    cold = [{"backend": name, "load_seconds": 1.0, "peak_bytes": 1e8} for name in [*speeds, AGAIN]]
    return verdict.summarize_rounds(rows, cold, arms, REFERENCE, AGAIN)


def test_what_to_ship():
    speeds = {REFERENCE: 400.0, "fast": 800.0, "faster": 1200.0}
    told = verdict.decide(summary_of(speeds), Benchmark(), REFERENCE, AGAIN)
    assert told.ship["backend"] == "faster"
    assert told.ship["ratio"] == pytest.approx(3.0, rel=0.02)
    assert told.tied == []
    assert "at batch 64, accuracy +0.00 [-0.10, +0.10] points" in told.sentence
    # The fastest one costs too much accuracy.
    told = verdict.decide(summary_of(speeds, {"faster": -0.0045}), Benchmark(), REFERENCE, AGAIN)
    assert told.ship["backend"] == "fast"
    told = verdict.decide(summary_of(speeds), Benchmark(latency_ms=100), REFERENCE, AGAIN)
    assert told.ship is None  # 15 calls are too few for the quantile
    assert "no arm meets the constraints" in told.sentence


def test_equally_fast_ones_are_called_so():
    told = verdict.decide(summary_of({REFERENCE: 400.0, "a": 800.0, "b": 801.0}), Benchmark(), REFERENCE, AGAIN)
    assert told.tied == [{"a": "b", "b": "a"}[told.ship["backend"]]]
    assert "cannot be distinguished" in told.sentence


def test_replicates_not_rounds_make_the_interval():
    """A process that happens to be slow counts once, however many rounds it measures."""
    generator = np.random.default_rng(0)
    rows = []
    for replicate in range(5):
        luck = float(np.exp(generator.normal(0, 0.1)))
        for turn in range(50):
            for name in (REFERENCE, AGAIN, "other"):
                seconds = 0.1 * (luck if name == "other" else 1.0)
                rows.append(
                    {"backend": name, "scope": "host arrays", "batch_size": 64, "replicate": replicate, "round": turn}
                    | {
                        "images": 64,
                        "seconds": seconds,
                        "call_ms": "1",
                        "event_ms": "",
                        "foreign_cores": 0.0,
                        "note": "",
                    }
                )
    arms = [
        SimpleNamespace(
            name=name,
            check=SimpleNamespace(artifact=SimpleNamespace(label="x/m.onnx"), device="cpu"),
            precision="float32",
            note="",
            accuracy=parity(),
        )
        for name in (REFERENCE, "other")
    ]
    cold = [{"backend": name, "load_seconds": 1.0} for name in (REFERENCE, AGAIN, "other")]
    row = verdict.summarize_rounds(rows, cold, arms, REFERENCE, AGAIN).set_index("backend").loc["other"]
    assert row["ratio_high"] / row["ratio_low"] > 1.05  # 1.003 if each round counted


class Queue:
    """Answers an image in `service` seconds, one after the other."""

    def __init__(self, service):
        self.service = service

    def ask(self, do, rate, seconds, seed):
        assert do == "serve"
        arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, max(2, round(rate * seconds))))
        free, latencies = 0.0, []
        for arrival in arrivals:
            free = max(free, arrival) + self.service
            latencies.append(free - arrival)
        return {"latencies": latencies}


def test_the_highest_rate_under_a_latency():
    found = highest_rate(Queue(0.01), 50, 0)
    assert 40 < found < 110  # never much above what the queue can do at all
    assert highest_rate(Queue(0.001), 50, 0) > 5 * found
    assert highest_rate(Queue(0.01), 5, 0) == 0
