"""python -m harness.tune space=NAME|FILE.py [key=value ...]: trials -> confirm -> export -> benchmark -> report.

Trains the trials of a space on every device of this machine (or of a Ray cluster), confirms the best on fresh seeds,
exports the winner, checks and measures the export, and writes a report. The same command run again continues: only
what is missing runs. A value given here pins that parameter: it is not searched.

    python -m harness.tune space=quick
    python -m harness.tune space=final data.name=images data.root=DIR search.samples=1
    python -m harness.tune space=published search.variants=[baseline,model1] search.seeds=1

Exit codes: 0 all done; 1 a trial or a stage failed; 2 bad input; 130, 143 stopped by SIGINT, SIGTERM.
"""

import functools
import shlex
import sys
import types
from typing import Any

from harness import pipeline
from harness.config import Tune, command_line
from harness.search.resolution import resolve


class _AlsoTheFunction(types.ModuleType):
    """`from harness import tune` is pipeline.tune, and stays callable where this module was imported before."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return pipeline.tune(*arguments, **named)


sys.modules[__name__].__class__ = _AlsoTheFunction


def main() -> int:
    run = functools.partial(pipeline.run_stages, command=shlex.join(["python", "-m", "harness.tune", *sys.argv[1:]]))
    return command_line.run_command(Tune, run, __doc__ or "", resolve)


if __name__ == "__main__":
    sys.exit(main())
