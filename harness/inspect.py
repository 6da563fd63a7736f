"""python -m harness.inspect run=DIR image=FILE: filters, activations and predicted classes of a network for an image.

Writes run/inspect/<trial>/<image>/: filters.png, the filters of the first convolution; first.png and last.png, the
outputs of the first and the last convolution. Prints the predicted classes. Works with every architecture that has a
convolution; the trial is the winner unless another is named. Images of another size are resized.
"""

import sys

from harness.config import command_line
from harness.reporting.inspection import Inspect, inspect_trial


def main() -> int:
    return command_line.run_command(Inspect, inspect_trial, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
