"""What a process that serves exported files does; `RuntimeProcess` in export/process.py is the parent's side."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from export import Artifact
from export.runtimes import Unavailable
from harness.config import plugins
from harness.run import storage
from harness.run.manifest import Manifest
from harness.run.storage import Json


class ArtifactServer:
    """Serves one file at a time; each public method handles a request."""

    def load(self, folder: str, name: str, runtime: str, device: str, threads: int, images: str) -> Json:
        """Load file `name` of `folder` into the runtime; `images` is the .npy file of its inputs.

        Raises Unavailable where the file is not intact, fewer than `threads` cores are usable, or the runtime cannot.
        """
        artifact = Artifact(Path(folder), Manifest.read(Path(folder) / "manifest.json"), name)
        self.images = np.load(images, mmap_mode="c")  # writable, as PyTorch wants its inputs
        if storage.sha256(artifact.path) != artifact.entry.sha256:
            raise Unavailable("its SHA-256 differs from manifest.json: export it again")
        if usable_cores() < threads:
            raise Unavailable(f"{threads} threads were asked for, and this process may use {usable_cores()} cores")
        if artifact.entry.format == "onnx":
            refuse_external_data(artifact.path)
        started = time.perf_counter()
        self.predict: Any = plugins.load("export.runtimes", runtime, "load")(artifact, device, threads)
        self.artifact, self.runtime, self.device, self.threads = artifact, runtime, device, threads
        return {"load_seconds": time.perf_counter() - started}

    def answers(self, to: str, batch_size: int) -> Json:
        """Write the logits [N, classes] of all images to the .npy file `to`."""
        started = time.perf_counter()
        found = [
            self.predict(np.ascontiguousarray(self.images[i : i + batch_size]))
            for i in range(0, len(self.images), batch_size)
        ]
        np.save(to, np.concatenate(found))
        return {"seconds": time.perf_counter() - started}


def refuse_external_data(path: Path) -> None:
    """Raises Unavailable where an ONNX file keeps weights in other files, which its digest does not cover."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise Unavailable(f"is no ONNX file ({type(error).__name__})") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
        raise Unavailable("has weights in other files, which its SHA-256 does not cover: save it as one file")


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors of a protobuf message, however deep."""
    import onnx
    from google.protobuf.message import Message

    pending = [message]
    while pending:
        one = pending.pop()
        if isinstance(one, onnx.TensorProto):
            yield one
            continue
        for field, value in one.ListFields():
            if field.message_type is not None:
                pending += [value] if isinstance(value, Message) else list(value)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
