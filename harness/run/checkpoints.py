"""Files of tensors: trained weights, and checkpoints whose names carry their own SHA-256."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
from harness.run.storage import sha256, write_atomically


def save_weights(path: Path, state: Mapping[str, "torch.Tensor"]) -> str:
    """Write a state dict as safetensors; returns the file's SHA-256."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load_weights(path: Path, expected_sha256: str | None = None) -> dict[str, "torch.Tensor"]:
    """Read a state dict. Raises ValueError where the file's SHA-256 is not the expected one, or it is no safetensors
    file."""
    found = sha256(path)
    if expected_sha256 is not None and found != expected_sha256:
        raise ValueError(f"{path}: SHA-256 is {found}, recorded was {expected_sha256}; the file is corrupt or replaced")
    return _loaded(path)


# A checkpoint's name has its sequence number and the first half of its SHA-256: finding the newest needs no clock, and
# checking that it is intact needs no other file.
_GENERATION = re.compile(r"checkpoint-(\d{8})-([0-9a-f]{32})\.safetensors")


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted((path for path in folder.glob("checkpoint-*") if _GENERATION.fullmatch(path.name)), reverse=True)


def save_checkpoint(folder: Path, sequence: int, tensors: Mapping[str, "torch.Tensor"], about: Any) -> None:
    """Write a checkpoint, verify it by reading it back, then remove all older ones but the previous.

    `about`: a JSON value. Raises OSError where the disk is full or fails; earlier checkpoints then remain.
    """
    from safetensors.torch import save

    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(dense, {"about": json.dumps(about)})
    path = folder / f"checkpoint-{sequence:08d}-{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    write_atomically(path, content, private=True)
    if not _named(path, sha256(path)):
        raise OSError(f"{path}: verification failed: the file on disk differs from what was written")
    for old in checkpoint_files(folder)[2:]:
        old.unlink()


def load_checkpoint(path: Path) -> tuple[dict[str, "torch.Tensor"], Any]:
    """Read (tensors, `about`). Raises ValueError where the checkpoint is corrupt."""
    if not _named(path, sha256(path)):
        raise ValueError(f"{path}: corrupt: its SHA-256 differs from the one in its name")
    try:
        about = json.loads(_header(path)["__metadata__"]["about"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: corrupt: it is no checkpoint of this project") from error
    return _loaded(path), about


LARGEST_HEADER = 32 << 20  # bytes: about 300,000 tensors


def _header(path: Path) -> Any:
    """The JSON header of a safetensors file. Raises ValueError where it is none."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"{path}: corrupt: its header has {size:,} bytes")
        return json.loads(file.read(size))


def _loaded(path: Path) -> dict[str, "torch.Tensor"]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _header(path)
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}  # not the file's own memory
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: is no safetensors file of this project ({error})") from error


def remove_checkpoints(folder: Path) -> None:
    for path in checkpoint_files(folder):
        path.unlink(missing_ok=True)


def _named(path: Path, digest: str) -> bool:
    """Whether a checkpoint's name contains the beginning of this SHA-256."""
    named = _GENERATION.fullmatch(path.name)
    return named is not None and digest[:32] == named[2]
