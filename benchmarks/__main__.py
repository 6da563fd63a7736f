"""python -m benchmarks run=DIR [key=value ...]: how fast a run's exported models answer, in every runtime.

Writes inference.csv (raw rounds) and inference_summary.csv (images/s, latency, ratios to torch_eager with intervals).
Nothing else should run on the machine meanwhile.
"""

import sys

from harness import cli
from harness.config import BenchmarkConfig


def main(config: BenchmarkConfig) -> int:
    from benchmarks.inference import benchmark_exported
    from harness.progress import Progress
    from harness.results import RunDirectory

    run = RunDirectory.existing(config.run)
    progress = Progress(run.path / "run.log")
    with run.locked(), progress.live():
        benchmark_exported(run, config.benchmark, progress)
    progress.check_logged()
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(BenchmarkConfig, main, __doc__ or ""))
