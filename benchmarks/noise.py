"""python -m benchmarks.noise run=DIR [key=value ...]: how reliable the inference benchmark is on this machine.

Repeats complete sittings of the benchmark with one exported file as three arms: itself, itself again, and itself slowed
down by a planted share of each call. Reports how often the 95 % interval of the ratio of equal arms excludes 1, which
should happen in 5 % of sittings, and how often the slower arm is detected; each with its exact binomial interval. `out`
is written after each sitting.
"""

import sys
import tempfile
from pathlib import Path

from pydantic import Field

from harness.config import StageConfig, command_line
from harness.run.storage import Json

PLANTED = """
import time
from export.runtimes.onnxruntime import load as real
FORMAT = "onnx"
def load(artifact, device, threads):
    predict = real(artifact, device, threads)
    def slower(images):
        started = time.perf_counter()
        logits = predict(images)
        until = time.perf_counter() + {share} * (time.perf_counter() - started)
        while time.perf_counter() < until:
            pass
        return logits
    return slower
"""


class Noise(StageConfig):
    sittings: int = Field(60, ge=2, description="complete sittings of the benchmark")
    replicates: int = Field(8, ge=2, description="fresh processes of each arm in a sitting")
    rounds: int = Field(2, ge=1, description="interleaved measurements in a replicate")
    round_seconds: float = Field(0.1, gt=0, description="length of a measurement, at least one call")
    batch_size: int = Field(8, ge=1, description="images per call")
    planted: float = Field(0.1, gt=0, le=10, description="share of each call by which the third arm is slower")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: one per usable core")
    file: str = Field("model.onnx", description="exported file, served by onnxruntime on the CPU")
    out: Path = Field(Path("noise.json"), description="JSON file for the results")


def main(config: Noise) -> int:
    import numpy as np
    import torch

    from benchmarks.inference.sitting import AGAIN, Arm, Sitting
    from benchmarks.inference.summary import summarize_rounds
    from export import Artifact
    from export.check import Check
    from harness.config import BadInput, Benchmark, Normalization
    from harness.config.errors import NotYet
    from harness.data.batches import Normalizer
    from harness.data.dataset import load_dataset
    from harness.run import storage, system
    from harness.run.manifest import Manifest
    from harness.run.progress import Progress
    from harness.run.trust import trusted_run

    run = trusted_run(config.run, config.trust)
    file = next(run.path.glob("exported/*/manifest.json"), None)
    if file is None:
        raise NotYet(f"run={run.path}: nothing is exported; run `python -m export` first")
    manifest = Manifest.read(file)
    if config.file not in manifest.files or manifest.files[config.file].format != "onnx":
        known = [name for name, entry in manifest.files.items() if entry.format == "onnx"]
        raise BadInput(f"file={config.file}: no exported ONNX file; choose one of {', '.join(known)}")
    artifact = Artifact(file.parent, manifest, config.file)
    data = load_dataset(run.recorded().data_config)
    threads = config.threads or system.environment().cores
    same = config.model_dump(include={"replicates", "rounds", "round_seconds"})
    settings = Benchmark(batch_sizes=[config.batch_size], **same)
    progress, ratios = Progress(), list[Json]()
    with tempfile.TemporaryDirectory() as folder, progress.live():
        normalize = Normalizer(Normalization.model_validate(manifest.normalization), torch.device("cpu"), "contiguous")
        images = Path(folder) / "images.npy"
        np.save(images, normalize(torch.from_numpy(data.test.images[data.test.rows])).numpy())
        (Path(folder) / "slowed.py").write_text(PLANTED.format(share=config.planted))
        checks = [Check(artifact, one, "cpu") for one in ("onnxruntime", str(Path(folder) / "slowed.py"))]
        arms = [Arm(check.name, check, "float32", accuracy=artifact.entry.parity) for check in checks]
        storage.write_atomically(arms[1].check.answers, arms[0].check.answers.read_bytes())
        largest = float(np.abs(np.load(arms[0].check.answers)).max())
        for number in range(config.sittings):
            sitting = Sitting(arms, images, largest, settings, threads, Path(folder) / "log")
            rows, cold = [], []
            for replicate in range(config.replicates):
                more, costs, _ = sitting.replicate(number * config.replicates + replicate, progress)
                rows += more
                cold += costs
            summary = summarize_rounds(rows, cold, arms, arms[0].name, AGAIN, settings.max_accuracy_drop)
            for kind, name in (("equal", AGAIN), ("slower", arms[1].name)):
                row = summary.set_index("backend").loc[name]
                ratios.append({"sitting": number, "kind": kind, **{k: row[k].item() for k in RATIO}})
            found = detection_rates(ratios)
            storage.write_json(
                config.out,
                {"settings": config.model_dump(mode="json", exclude={"run", "out"}), "threads": threads}
                | {"environment": system.environment().to_json(), **found, "ratios": ratios},
            )
            progress.line(f"sitting {number + 1} of {config.sittings}: {describe_rates(found)}")
        arms[1].check.answers.unlink()
    return 0


RATIO = ("ratio", "ratio_low", "ratio_high")


def detection_rates(ratios: list[Json]) -> Json:
    """Rates of false alarms and of detections over sittings, with exact 95 % binomial intervals."""
    from scipy.stats import binomtest

    equal = [r for r in ratios if r["kind"] == "equal"]
    slower = [r for r in ratios if r["kind"] == "slower"]
    told = {}
    for name, hits, n in (
        ("false_alarms", sum(not r["ratio_low"] <= 1 <= r["ratio_high"] for r in equal), len(equal)),
        ("seen", sum(r["ratio_high"] < 1 for r in slower), len(slower)),
    ):
        interval = binomtest(hits, n).proportion_ci(0.95, "exact")
        told[name] = {"hits": hits, "n": n, "share": hits / n, "low": float(interval.low), "high": float(interval.high)}
    return told


def describe_rates(found: Json) -> str:
    """The rates as a line of text."""
    said = {"false_alarms": "of equal arms reported as different", "seen": "of slower arms detected"}
    return ", ".join(
        f"{found[k]['share']:.3f} [{found[k]['low']:.3f}, {found[k]['high']:.3f}] {text} (n = {found[k]['n']})"
        for k, text in said.items()
    )


if __name__ == "__main__":
    sys.exit(command_line.run_command(Noise, main, __doc__ or ""))
