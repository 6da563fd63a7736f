"""python -m harness.report run=DIR: figures and report/index.html of a run.

Reads the run directory and nothing else; writes one self-contained page, and the figures as report/figures/*.png.
"""

import sys

from harness.config import BadInput, ReportConfig, command_line


def report(config: ReportConfig) -> int:
    from harness.reporting.page import write_report
    from harness.run.directory import RunDirectory
    from harness.run.progress import Progress

    run = RunDirectory.existing(config.run)
    run.check_own()
    progress = Progress(run.path / "run.log")
    with progress.live():
        try:
            write_report(run, progress)
        except (BadInput, OSError):
            raise
        except Exception as error:
            reason = f"its files cannot be shown ({type(error).__name__}: {error})"
            raise BadInput(f"run={run.path}: {reason}; run with --debug to see where") from error
    progress.line(f"report {run.path / 'report' / 'index.html'}")
    progress.check_logged()
    return 0


def main() -> int:
    return command_line.run_command(ReportConfig, report, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
