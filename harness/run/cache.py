"""The cache folder of this user: decoded data sets, compiled code, execution plans, features."""

import os
import platform
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Where `kind` (datasets, compiled, plans) is kept for later runs of this user."""
    return Path(os.environ.get("HARNESS_CACHE") or Path.home() / ".cache" / "harness") / kind


def compiled_folder() -> Path:
    """Of this user and node alone: compiled code fits the machine that made it."""
    folder = cache_folder("compiled") / platform.node()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
