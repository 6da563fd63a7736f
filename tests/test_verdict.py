"""What the benchmark recommends, and the rate under a latency, from measurements made up here."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import parity

from benchmarks.inference import verdict
from benchmarks.inference.sitting import AGAIN, REFERENCE, highest_rate
from benchmarks.inference.summary import summarize_rounds
from harness.config import Benchmark


def decided(speeds, records=None, replicates=5, precision="float32", noise=0.01, **settings):
    """The recommendation from speeds by arm at batch size 64; `records`: parity by arm."""
    generator = np.random.default_rng(0)
    arms = [
        SimpleNamespace(
            name=name,
            check=SimpleNamespace(artifact=SimpleNamespace(label=f"x/{name}.onnx"), device="cpu"),
            precision="float32" if name == REFERENCE else precision,
            note="",
            accuracy=(records or {}).get(name, parity()),
        )
        for name in speeds
    ]
    rows = []
    for replicate in range(replicates):
        for turn in range(3):
            for name, speed in {**speeds, AGAIN: speeds[REFERENCE]}.items():
                seconds = 64 / speed * float(np.exp(generator.normal(0, noise)))
                rows.append(
                    {"backend": name, "scope": "host arrays", "batch_size": 64, "replicate": replicate, "round": turn}
                    | {"images": 64, "seconds": seconds, "call_ms": f"{1000 * seconds:.4g}", "event_ms": ""}
                    | {"foreign_cores": 0.0, "note": ""}
                )
    cold = [{"backend": name, "load_seconds": 1.0, "peak_bytes": 1e8} for name in [*speeds, AGAIN]]
    options = Benchmark.model_validate(settings)
    summary = summarize_rounds(rows, cold, arms, REFERENCE, AGAIN, options.max_accuracy_drop)
    return verdict.decide(summary, pd.DataFrame(rows), options, REFERENCE, AGAIN)


def test_what_to_ship():
    told = decided(SPEEDS)
    assert told.ship["backend"] == "faster"
    assert told.ship["ratio"] == pytest.approx(3.0, rel=0.02)
    assert (told.tied, told.reservation, told.settled) == ([], "", True)
    assert "at batch 64, test accuracy 80.00 % [79.20, 80.77], logits as PyTorch's" in told.sentence


SPEEDS = {REFERENCE: 400.0, "fast": 800.0, "faster": 1200.0}


def test_accuracy_comes_before_speed():
    """The fastest one loses more than is allowed."""
    told = decided(SPEEDS, {"faster": parity(lost=120, gained=20)}, precision="int8")
    assert told.ship["backend"] == "fast"
    assert "test accuracy 80.00 % [79.20, 80.77], +0.00 [-0.04, +0.04] points from PyTorch's" in told.sentence


def test_too_few_images_are_a_reservation():
    """Of the fastest arm, with the fastest one that has none; and none at all where an equally fast one has none."""
    few = {"faster": parity(images=160)}
    told = decided(SPEEDS, few, precision="int8")
    assert told.ship["backend"] == "faster"
    assert "reservation: too few images to exclude a drop of more than 0.5 points (about 765 would do)" in told.sentence
    assert "; without reservation: fast.onnx with fast on cpu: 1.99" in told.sentence
    told = decided(SPEEDS | {"fast": 1200.0}, few, precision="int8")
    assert (told.ship["backend"], told.tied, told.reservation) == ("fast", ["faster"], "")
    told = decided(SPEEDS, {name: parity(images=30) for name in SPEEDS}, precision="int8")
    assert "without reservation: torch_eager.onnx with torch_eager on cpu: the reference itself" in told.sentence


def test_a_latency_limit():
    """It is met or exceeded by the interval of the share of calls beyond it, or by too few calls."""
    assert decided(SPEEDS, latency_ms=100).ship["backend"] == "faster"  # 15 calls are too few, but none is beyond it
    assert "too few calls to say whether its p90 latency is at most 100 ms" in decided(SPEEDS, latency_ms=100).sentence
    assert not decided(SPEEDS, latency_ms=100).settled
    assert decided(SPEEDS, replicates=20, latency_ms=100).reservation == ""
    told = decided(SPEEDS, replicates=20, latency_ms=1)
    assert told.ship is None
    assert told.settled  # more replicates would bring none
    assert "no arm meets the constraints" in told.sentence


def test_equally_fast_ones_are_called_so():
    told = decided({REFERENCE: 400.0, "a": 800.0, "b": 801.0})
    assert told.tied == [{"a": "b", "b": "a"}[told.ship["backend"]]]
    assert "cannot be distinguished from it in speed" in told.sentence
    assert told.settled  # they differ by less than five percent


def test_too_noisy_a_sitting_is_not_settled():
    assert not decided({REFERENCE: 400.0, "a": 800.0, "b": 803.0}, noise=0.2).settled


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
    row = summarize_rounds(rows, cold, arms, REFERENCE, AGAIN, 0.005).set_index("backend").loc["other"]
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


@pytest.mark.parametrize(("noise", "replicates"), [(1.5, 3), (2.5, 5), (1.0, 2)])
def test_nothing_is_recommended_from_an_interval_that_says_nothing(noise, replicates):
    told = decided({REFERENCE: 1000, "fast": 3000}, noise=noise, replicates=replicates)
    assert (told.ship, told.tied) == (None, [])
    assert told.sentence.startswith("nothing is recommended: the speed of")
    assert not told.settled
