"""CIFAR-10 through torchvision: 50,000 training and 10,000 test images of 32x32, ten classes.

The archive is taken from data.root, or downloaded into the user's cache; nothing is written into data.root. Its SHA-256
is checked before anything in it is unpickled: torchvision checks only MD5.
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from harness.config import BadInput, Data
from harness.data.dataset import Decoded, OnProgress
from harness.run.cache import cache_folder

ARCHIVE = "cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"


def identity(data: Data) -> str:
    """The archive's SHA-256, which does not depend on its path. Downloads the archive if there is none in the cache.

    Raises BadInput where it cannot be downloaded or its SHA-256 differs.
    """
    cached = cache_folder("datasets") / f"cifar10-{SHA256[:16]}.checked"
    if not cached.exists():  # takes a second, so once per machine; decode() checks again
        _check(_archive(data))
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        cached.touch()
    return SHA256


def decode(data: Data, progress: OnProgress) -> Decoded:
    from torchvision.datasets import CIFAR10

    if data.size not in (None, 32):
        raise BadInput(f"data.size={data.size}: cifar10 is 32x32; leave it out, or use data.name=images")
    archive = _archive(data)
    _check(archive)
    with tempfile.TemporaryDirectory(dir=cache_folder("datasets")) as unpacked:
        (Path(unpacked) / ARCHIVE).symlink_to(archive.absolute())
        parts = [CIFAR10(unpacked, train=train, download=True) for train in (True, False)]  # downloads nothing
    progress(60_000, 60_000)
    train, test = ((part.data, np.asarray(part.targets, dtype=np.int64)) for part in parts)
    return Decoded(classes=tuple(parts[0].classes), train=train, test=test)


def _archive(data: Data) -> Path:
    """The archive's path. One that is in neither place is downloaded, to a temporary folder, checked and moved."""
    folder = cache_folder("datasets") / "cifar10"
    archive = (data.root or folder) / ARCHIVE
    if archive.is_file():
        return archive
    if data.root:
        raise BadInput(
            f"data.root={data.root}: has no {ARCHIVE}; put it there, or leave data.root out: then it is downloaded "
            "into the cache"
        )
    from filelock import FileLock
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(cache_folder("datasets") / "cifar10.lock"), tempfile.TemporaryDirectory(dir=folder) as temporary:
        if archive.is_file():  # another process has downloaded it
            return archive
        try:
            download_url(CIFAR10.url, temporary, ARCHIVE, CIFAR10.tgz_md5)
        except Exception as error:
            raise BadInput(
                f"data.name=cifar10: downloading {ARCHIVE} failed ({type(error).__name__}); put it into data.root=DIR, "
                "or use data.name=digits (needs no files), or data.name=images data.root=DIR"
            ) from error
        _check(Path(temporary) / ARCHIVE)
        (Path(temporary) / ARCHIVE).replace(archive)
    return archive


def _check(archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise BadInput(f"data.root={archive.parent}: {ARCHIVE} has SHA-256 {found}, not {SHA256}; fetch it again")
