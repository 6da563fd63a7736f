"""python -m benchmarks run=DIR [key=value ...]: inference speed of a run's exported models in the runtimes.

Writes inference.csv (raw rounds) and inference_summary.csv (images/s, latency, ratios to torch_eager with intervals).
Nothing else should run on the machine at the same time.
"""

import sys

from harness.config import BenchmarkConfig, command_line


def benchmark_run(config: BenchmarkConfig) -> int:
    from benchmarks.inference.runner import benchmark_exported
    from harness.run.progress import Progress
    from harness.run.trust import trusted_run

    run = trusted_run(config.run, config.trust)
    progress = Progress(run.path / "run.log")
    with run.locked(), progress.live():
        benchmark_exported(run, config.benchmark, progress)
    progress.check_logged()
    return 0


def main() -> int:
    return command_line.run_command(BenchmarkConfig, benchmark_run, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
