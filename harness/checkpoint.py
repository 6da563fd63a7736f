"""Atomic, verified saving and loading: a file under its final name is whole, or it is not there."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


class StorageError(OSError):
    """A disk takes no more: it is full, read-only, or the file larger than it may be."""


class Superseded(BaseException):
    """Another process has taken what this one was to write."""


ATTEMPT = ".attempt"
_taken: dict[Path, str] = {}


def take(folder: Path) -> None:
    """From now on this process alone writes into the folder: one that took it before, say on a node that was given up
    and comes back, meets Superseded."""
    _taken.pop(folder, None)
    token = uuid.uuid4().hex
    write_atomically(folder / ATTEMPT, token)
    _taken[folder] = token


def leave(folder: Path) -> None:
    """Nothing more is to be written by this process."""
    if folder in _taken and _is_ours(folder):
        (folder / ATTEMPT).unlink(missing_ok=True)
    _taken.pop(folder, None)


def _is_ours(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return (folder / ATTEMPT).read_text() == _taken[folder]
    return False


def _check_taken(folder: Path) -> None:
    if folder in _taken and not _is_ours(folder):
        raise Superseded(f"{folder}: another process has taken it")


@contextlib.contextmanager
def storage_errors_of(path: Path) -> Iterator[None]:
    """Say of what the disk refuses where it was to go and how much room there is."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free:,}"
        raise StorageError(f"{path}: {os.strerror(error.errno).lower()}, {free} bytes free there") from error


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename. StorageError where the disk does not take it."""
    data = content.encode() if isinstance(content, str) else content
    _check_taken(path.parent)
    with storage_errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            _check_taken(path.parent)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


_SEAL = b',\n  "sha256": "'


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As JSON that ends with the SHA-256 of what comes before, which `read_json` checks."""
    body = json.dumps(value, indent=2, default=str).removesuffix("\n}").encode()
    write_atomically(path, body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n')


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; ValueError where that is not what is there."""
    content = path.read_bytes()
    body, _, seal = content.rpartition(_SEAL)
    if seal != hashlib.sha256(body).hexdigest().encode() + b'"\n}\n':
        raise ValueError(f"{path}: is torn, or was changed by hand")
    value = json.loads(content)
    del value["sha256"]
    return value


def write_array(path: Path, values: "np.ndarray") -> None:
    """As .npy."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, values)
    write_atomically(path, content.getvalue())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(path: Path, expected_sha256: str) -> bool:
    """Whether a file is there, and the one that was written."""
    return path.is_file() and sha256(path) == expected_sha256


def save_weights(path: Path, state: Mapping[str, "torch.Tensor"]) -> str:
    """Write a state dict as safetensors; returns the file's SHA-256."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load_weights(path: Path, expected_sha256: str | None = None) -> dict[str, "torch.Tensor"]:
    """Read a state dict; ValueError where the file is not the one that was written."""
    from safetensors.torch import load

    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if expected_sha256 is not None and found != expected_sha256:
        raise ValueError(f"{path}: SHA-256 is {found}, recorded was {expected_sha256}; the file is torn or replaced")
    return load(content)


# A checkpoint's name has its sequence number and the beginning of its SHA-256: which is newest depends on no clock, and
# whether it is whole on no other file.
_GENERATION = re.compile(r"checkpoint-(\d{8})-([0-9a-f]{32})\.safetensors")


def generations(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if _GENERATION.fullmatch(path.name)), reverse=True)


def save_generation(folder: Path, sequence: int, tensors: Mapping[str, "torch.Tensor"], about: Any) -> None:
    """Write a checkpoint, and once it reads back as it was written remove all but the one before it.

    `about`: what JSON can hold. OSError where the disk is full or fails; earlier checkpoints are there still.
    """
    from safetensors.torch import save

    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(dense, {"about": json.dumps(about)})
    path = folder / f"checkpoint-{sequence:08d}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    write_atomically(path, content)
    if not _named(path, sha256(path)):
        raise OSError(f"{path}: does not read back as it was written")
    for old in generations(folder)[2:]:
        old.unlink()


def load_generation(path: Path) -> tuple[dict[str, "torch.Tensor"], Any]:
    """(tensors, `about`); ValueError where the checkpoint is torn."""
    from safetensors.torch import load

    content = path.read_bytes()
    if not _named(path, hashlib.sha256(content).hexdigest()):
        raise ValueError(f"{path}: is not what its name says that was written")
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]  # of which the library gives no bytes' metadata
    return load(content), json.loads(json.loads(header)["__metadata__"]["about"])


def remove_generations(folder: Path) -> None:
    for path in generations(folder):
        path.unlink(missing_ok=True)


def _named(path: Path, digest: str) -> bool:
    """Whether a checkpoint's name has that SHA-256."""
    named = _GENERATION.fullmatch(path.name)
    return named is not None and digest[:32] == named[2]
