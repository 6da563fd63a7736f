"""The user's cache folder: decoded data sets, compiled code, execution plans, features."""

import os
import platform
from pathlib import Path

from harness.config import BadInput


def cache_folder(kind: str) -> Path:
    """Folder where `kind` (datasets, compiled, plans) is cached for later runs of this user.

    Raises BadInput where the user has no home directory.
    """
    given = os.environ.get("HARNESS_CACHE")
    try:
        return Path(given).absolute() / kind if given else Path.home() / ".cache" / "harness" / kind
    except RuntimeError as error:
        raise BadInput("HARNESS_CACHE=: this user has no home directory; set it to a folder for caches") from error


def compiled_folder() -> Path:
    """Cache of compiled code, one per user and node: compiled code is specific to the machine that built it."""
    folder = cache_folder("compiled") / platform.node()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder
