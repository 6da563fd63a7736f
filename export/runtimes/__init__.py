"""What can serve an exported model, one runtime a file. Parity checks and benchmarks use the same ones.

    FORMAT = "onnx"                         which of a manifest's files it serves
    PRECISION = "bfloat16"                  if it does not compute in the file's own
    load(artifact, device, threads)         -> callable

The callable takes and returns host arrays: float32 [N, 3, H, W] normalised (or uint8 [N, H, W, 3], as the file's entry
in the manifest says) to logits float32 [N, classes]. `device` is cpu or cuda, `threads` those of CPU work. A runtime
that cannot do what it is asked here raises Unavailable with the reason; it never does something else instead.
"""

from collections.abc import Callable

import numpy as np

Predict = Callable[[np.ndarray], np.ndarray]


class Unavailable(RuntimeError):
    """This runtime cannot serve this file on this machine."""
