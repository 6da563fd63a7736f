"""python -m harness.report run=DIR: figures and report/index.html of a run.

Reads the run directory and nothing else; writes one self-contained page, and the figures as report/figures/*.png.
"""

import sys

from harness.config import ReportConfig, command_line


def report(config: ReportConfig) -> int:
    from harness.reporting.page import write_report
    from harness.run.directory import RunDirectory
    from harness.run.progress import Progress

    run = RunDirectory.existing(config.run)
    run.check_own()
    progress = Progress(run.path / "run.log")
    with progress.live():
        write_report(run, progress)
    progress.line(f"report {run.path / 'report' / 'index.html'}")
    progress.check_logged()
    return 0


def main() -> int:
    return command_line.run_command(ReportConfig, report, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
