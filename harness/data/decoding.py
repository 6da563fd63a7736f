"""Reads image files as RGB, in a child process with limits on time and memory (see `harness/run/child.py`).

harness/data/decoder.py is the child's side.
"""

import atexit
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import BadInput
from harness.run.child import Child, ChildDied
from harness.run.storage import Json

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm"}
SECONDS = 12.0  # for one image
MEMORY_BYTES = 1 << 30
SIXTEEN_BITS = 65535


@dataclass
class Outcome:
    """What happened to images that were read: `failed` with the reason, `converted` by kind with their number, both by
    path; `largest`: the largest value among 16-bit grey images."""

    failed: dict[str, str] = field(default_factory=dict)
    converted: dict[str, int] = field(default_factory=dict)
    largest: int | None = None

    def add(self, other: "Outcome") -> None:
        self.failed |= other.failed
        for kind, count in other.converted.items():
            self.converted[kind] = self.converted.get(kind, 0) + count
        if other.largest is not None:
            self.largest = max(other.largest, self.largest or 0)


class Decoder:
    """A child process that reads images. `size` and `read` start another one where an image has ended it."""

    def __init__(self) -> None:
        self._child: Child | None = None

    def size(self, path: str) -> tuple[int, int]:
        """(width, height) of an image. Raises ValueError where it cannot be read."""
        with tempfile.TemporaryDirectory() as folder:
            answer, reason = self._ask("size", Path(folder) / "position", path=path)
        if reason or "unreadable" in answer:
            raise ValueError(reason or answer["unreadable"])
        return tuple(answer["size"])

    def read(self, paths: Sequence[str], side: int, resize: bool, to: Path, offset: int) -> Outcome:
        """Write the images, uint8 [len(paths), side, side, 3], into the file `to` from byte `offset` on. Where not
        `resize`, an image of another size is a failure."""
        found, each, first = Outcome(), side * side * 3, 0
        with tempfile.TemporaryDirectory() as folder:
            position = Path(folder) / "position"
            while first < len(paths):
                own = {"paths": list(paths[first:]), "side": side, "resize": resize, "to": str(to)}
                answer, reason = self._ask("read", position, **own, offset=offset + first * each)
                if not reason:
                    found.add(Outcome(**answer))
                    return found
                if not (at := position.read_text()):
                    raise RuntimeError(f"the image decoder does not start: {reason}")
                done = first + int(at)  # this image ended the process: go on after it
                if done > first:
                    found.add(self.read(paths[first:done], side, resize, to, offset + first * each))
                found.failed[paths[done]] = reason
                first = done + 1
        return found

    def _ask(self, do: str, position: Path, **request: Any) -> tuple[Json, str]:
        """(answer, empty) or (nothing, why the process ended)"""
        if self._child is None or not self._child.is_alive():  # it ends with the thread that started it
            environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._child = Child("harness.data.decoder", memory_bytes=MEMORY_BYTES, environment=environment)
        position.write_text("")
        seconds = 30.0 + SECONDS * len(request.get("paths", [0]))
        try:
            return self._child.ask(do, seconds, position=str(position), **request), ""
        except ChildDied as error:
            self.close()
            return {}, str(error)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
        self._child = None


_decoder: Decoder | None = None


def decoder() -> Decoder:
    """This process's decoder, kept for later calls."""
    global _decoder
    if _decoder is None:
        _decoder = Decoder()
        atexit.register(_decoder.close)
    return _decoder


def read_images(paths: Sequence[Path], side: int, key: str) -> "np.ndarray":
    """Read single image files, uint8 [N, side, side, 3]. Raises BadInput with `key`, which named them, where one is no
    image."""
    import numpy as np

    with tempfile.NamedTemporaryFile() as file:
        file.truncate(len(paths) * side * side * 3)
        found = decoder().read([str(path.absolute()) for path in paths], side, True, Path(file.name), 0)
        for path, reason in found.failed.items():
            raise BadInput(f"{key}={path}: cannot be read as an image: {reason}; give another file")
        return np.fromfile(file.name, np.uint8).reshape(len(paths), side, side, 3)
