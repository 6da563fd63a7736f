"""Atomic, verified files: a file under its final name is always complete."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.config import BadInput
from harness.config.errors import StorageError

if TYPE_CHECKING:
    import numpy as np


# A JSON object with arbitrary fields: a configuration, or fields of a later version.
Json = dict[str, Any]


LARGEST = 16 << 30  # bytes of any file that is read again: weights of a very large network
NPY_HEADER = 10_240  # bytes that NumPy accepts before the values


class Corrupt(ValueError):
    """A file is not as it was written."""


class Superseded(BaseException):
    """Another process has taken over the folder that this one writes to."""


ATTEMPT = ".attempt"
_taken: dict[Path, str] = {}


def acquire(folder: Path) -> None:
    """Take over the folder for writing: in a process that acquired it before, say on a node presumed lost that comes
    back, writes raise Superseded."""
    _taken.pop(folder, None)
    token = uuid.uuid4().hex
    write_atomically(folder / ATTEMPT, token)
    _taken[folder] = token


def release(folder: Path) -> None:
    """Give up the folder: this process writes nothing more into it."""
    if folder in _taken and _is_ours(folder):
        (folder / ATTEMPT).unlink(missing_ok=True)
    _taken.pop(folder, None)


def _is_ours(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return (folder / ATTEMPT).read_text() == _taken[folder]
    return False


def _check_taken(folder: Path) -> None:
    if folder in _taken and not _is_ours(folder):
        raise Superseded(f"{folder}: another process has taken over this folder")


@contextlib.contextmanager
def storage_errors_of(path: Path) -> Iterator[None]:
    """Turn disk errors into a StorageError that names `path` and the free space in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free:,}"
        remedy = "give another place" if error.errno == errno.EROFS else "free some space there"
        reason = f"{os.strerror(error.errno).lower()}, {free} bytes free there"
        raise StorageError(f"{path}: {reason}; {remedy}, and run the same command again") from error


def write_atomically(path: Path, content: bytes | str, *, private: bool = False) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename. The permissions follow the umask; a `private`
    file is for this user alone.

    Raises StorageError where the disk refuses, Superseded where another process has taken over the folder.
    """
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
            if not private:
                os.chmod(temporary, 0o666 & ~_umask())
            _check_taken(path.parent)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


LARGEST_JSON = 16 << 20  # bytes
LARGEST_TABLE = 64 << 20


def read_file(path: Path, largest: int) -> bytes:
    """The content of a regular file. Raises Corrupt where it is a pipe or device, or larger than `largest` bytes."""
    check_regular(path, largest)
    return path.read_bytes()


def check_regular(path: Path, largest: int | None = None) -> None:
    """Raises Corrupt where it is a pipe or device, or larger than `largest` bytes, OSError where it does not exist."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise Corrupt(f"{path}: is not a regular file")
    if largest is not None and found.st_size > largest:
        raise Corrupt(f"{path}: has {found.st_size:,} bytes, more than this project writes")


def check_writable(path: Path, key: str) -> None:
    """Raises BadInput where `path` cannot be made or written to: checked on the nearest folder that exists."""
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise BadInput(f"{key}={path}: {place} is not a folder; give another path")
    if not os.access(place, os.W_OK | os.X_OK):
        raise BadInput(f"{key}={path}: {place} is not writable for this user; give another path")
    if (free := shutil.disk_usage(place).free) < LEAST_FREE:
        raise BadInput(f"{key}={path}: {free / 2**20:.1f} MiB are free there; free some, or give another path")


LEAST_FREE = 32 << 20  # bytes: less would fail at the first files
_SEAL = b',\n  "sha256": "'


@functools.cache
def _umask() -> int:
    mask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write JSON that ends with the SHA-256 of the preceding bytes, which `read_json` checks."""
    body = json.dumps(value, indent=2, default=str).removesuffix("\n}").encode()
    write_atomically(path, body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n')


def read_json(path: Path) -> Json:
    """Read a file of `write_json`. Raises Corrupt where it is none, or its SHA-256 does not match."""
    content = read_file(path, LARGEST_JSON)
    body, _, seal = content.rpartition(_SEAL)
    if seal != hashlib.sha256(body).hexdigest().encode() + b'"\n}\n':
        raise Corrupt(f"{path}: SHA-256 mismatch: corrupt or edited")
    try:
        value = json.loads(content)
        del value["sha256"]
        if b"\\ud" in content.lower():  # half a character, which cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
        return dict(value)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Corrupt(f"{path}: is no JSON object ({type(error).__name__})") from error


Share = Annotated[float, Field(ge=0, le=1)]  # an accuracy


class JsonFile(BaseModel):
    """A JSON file as an object; unknown fields, which a later version may add, are preserved."""

    model_config = ConfigDict(extra="allow")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file. Raises Corrupt, OSError where it cannot be read, BadInput where another version wrote it."""
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            reason = f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}"
            raise BadInput(f"{path}: another version of this project wrote it ({reason}); use that version") from error

    def to_json(self) -> Json:
        """The fields that were set explicitly."""
        return self.model_dump(exclude_unset=True)

    def write(self, path: Path) -> None:
        write_json(path, self.to_json())


def write_array(path: Path, values: "np.ndarray") -> None:
    """Write an array as .npy."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, values)
    write_atomically(path, content.getvalue())


def read_array(path: Path, shape: tuple[int, ...], dtype: str) -> "np.ndarray":
    """The array of a .npy file, memory-mapped. Raises Corrupt where the file holds anything else."""
    import numpy as np

    try:
        check_regular(path, np.dtype(dtype).itemsize * math.prod(shape) + NPY_HEADER)
        found = np.lib.format.open_memmap(path, mode="r")  # refuses what would be unpickled
    except Exception as error:  # its parser of headers raises many kinds
        raise Corrupt(f"{path}: no array ({type(error).__name__})") from error
    if found.shape != shape or found.dtype != dtype:
        raise Corrupt(f"{path}: not {dtype} {list(shape)}")
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a regular file. Raises Corrupt where it is none, or larger than any that this project handles."""
    check_regular(path, LARGEST)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(path: Path, expected_sha256: str) -> bool:
    """Whether a file exists and has the expected SHA-256."""
    with contextlib.suppress(OSError, Corrupt):
        return sha256(path) == expected_sha256
    return False
