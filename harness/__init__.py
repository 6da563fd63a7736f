"""A benchmarking harness for image classifiers: distributed trials, honest comparison, checked and measured export.

    from harness import Data, Trial, train
    record = train(Trial(architecture="baseline", epochs=2), Data(name="digits"))

Everything here is imported where it is first used: `import harness` alone imports neither torch nor Ray.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.config import BadInput, Data, Trial
    from harness.data.dataset import Decoded
    from harness.pipeline import benchmark, export, tune
    from harness.reporting.opened import open_run
    from harness.training.api import train
    from tune_spaces import Choice, Claim, Integer, LogUniform, Space, Uniform

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else onnxruntime, once imported, reports to its vendor

_WHERE = {
    "harness.config": ("BadInput", "Data", "Trial"),
    "harness.data.dataset": ("Decoded",),
    "harness.pipeline": ("benchmark", "export", "tune"),
    "harness.reporting.opened": ("open_run",),
    "harness.training.api": ("train",),
    "tune_spaces": ("Choice", "Claim", "Integer", "LogUniform", "Space", "Uniform"),
}

__all__ = [
    "BadInput",
    "Choice",
    "Claim",
    "Data",
    "Decoded",
    "Integer",
    "LogUniform",
    "Space",
    "Trial",
    "Uniform",
    "benchmark",
    "export",
    "open_run",
    "train",
    "tune",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("classifier-harness")
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
