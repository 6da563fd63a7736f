"""The parent's side of a process that serves exported files."""

import subprocess
from pathlib import Path
from typing import IO, Any

import psutil

from export.check import Check
from export.runtimes import Unavailable
from harness.run.child import Child, ChildDied, ChildError
from harness.run.storage import Json

SECONDS = 3600.0  # for one request: a runtime may compile for minutes


def memory_limit(device: str) -> int | None:
    """What a process that computes on the CPU may take: the memory that is free. A GPU's driver maps more than it uses,
    so on a GPU there is no limit."""
    return psutil.virtual_memory().available if device == "cpu" else None


class RuntimeProcess:
    """A process of `module` (a server as in export/server.py). Whatever goes wrong in it is an Unavailable or a
    RuntimeError here, with the reason."""

    def __init__(
        self,
        threads: int,
        *,
        module: str = "export.server",
        memory_bytes: int | None = None,
        seconds: float = SECONDS,
        errors: IO[str] | int = subprocess.DEVNULL,
    ):
        self.threads, self.seconds = threads, seconds
        environment = {"OMP_NUM_THREADS": str(threads)}
        self.child = Child(module, memory_bytes=memory_bytes, environment=environment, errors=errors)

    def load(self, check: Check, images: Path) -> Json:
        """Load the artifact of a check into its runtime; `images` is the .npy file of its inputs."""
        folder, name = str(check.artifact.folder), check.artifact.name
        return self.ask(
            "load",
            folder=folder,
            name=name,
            runtime=check.runtime,
            device=check.device,
            threads=self.threads,
            images=str(images),
        )

    def ask(self, do: str, **request: Any) -> Json:
        """The answer to a request. Raises Unavailable where the runtime cannot, RuntimeError where it failed."""
        try:
            return self.child.ask(do, self.seconds, **request)
        except ChildError as error:
            if error.kind == "Unavailable":
                raise Unavailable(str(error)) from error
            raise RuntimeError(f"{error.kind}: {error}") from error
        except ChildDied as error:
            raise RuntimeError(str(error)) from error

    def __enter__(self) -> "RuntimeProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.child.close()
