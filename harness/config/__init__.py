"""The typed configuration of every command, and its parsing from text. Imports neither torch nor ray.

`trial` and `stages` hold the pydantic models, which validate on construction, refuse unknown keys, and read and write
JSON; `errors` holds BadInput. `keys` parses dotted keys, `command_line` runs a command, `plugins` finds the files that
a configuration names.
"""

from harness.config.errors import BadInput
from harness.config.stages import (
    STAGES,
    Benchmark,
    BenchmarkConfig,
    Export,
    ExportConfig,
    ReportConfig,
    Resources,
    Search,
    Stage,
    StageConfig,
    Tune,
)
from harness.config.trial import Augmentation, Data, Normalization, Optimizer, Schedule, Strict, Trial, plugin_field

__all__ = [
    "STAGES",
    "Augmentation",
    "BadInput",
    "Benchmark",
    "BenchmarkConfig",
    "Data",
    "Export",
    "ExportConfig",
    "Normalization",
    "Optimizer",
    "ReportConfig",
    "Resources",
    "Schedule",
    "Search",
    "Stage",
    "StageConfig",
    "Strict",
    "Trial",
    "Tune",
    "plugin_field",
]
