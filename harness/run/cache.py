"""The user's cache folder: decoded data sets, compiled code, execution plans, features."""

import os
import platform
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Folder where `kind` (datasets, compiled, plans) is cached for later runs of this user."""
    return Path(os.environ.get("HARNESS_CACHE") or Path.home() / ".cache" / "harness") / kind


def compiled_folder() -> Path:
    """Cache of compiled code, one per user and node: compiled code is specific to the machine that built it."""
    folder = cache_folder("compiled") / platform.node()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
