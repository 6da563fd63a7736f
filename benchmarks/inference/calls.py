"""Times the calls of an arm: with host arrays, or with images and logits that stay on the device.

torch is imported only where tensors are used: it would count towards the memory of a runtime that does not need it.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export import Artifact
from export.runtimes import Served, Unavailable


@dataclass(frozen=True)
class Timed:
    """Per call: seconds by the host's clock, by the device's clock if it has one, and the logits [B, classes]."""

    seconds: list[float]
    event_seconds: list[float]
    logits: list[np.ndarray]


def timed(predict: Any, scope: str, device: str, batches: Sequence[Any]) -> Timed:
    """Time a call with each of the `batches`: arrays for scope host, tensors on the device for scope device.

    Raises Unavailable where an arm that takes only host arrays is to be timed on the device.
    """
    return _on_host(predict, batches) if scope == "host" else _on_device(predict, device, batches)


def _on_host(predict: Callable[[np.ndarray], np.ndarray], batches: Sequence[np.ndarray]) -> Timed:
    """A call ends when it returns."""
    clock, taken, found = time.perf_counter_ns, [], []
    for batch in batches:
        before = clock()
        logits = predict(batch)
        taken.append(clock() - before)
        found.append(logits)
    return Timed([nanoseconds * 1e-9 for nanoseconds in taken], [], found)


def _on_device(predict: Any, device: str, batches: Sequence[Any]) -> Timed:
    """A call ends when the device has finished all its work, on whichever stream the runtime uses. CUDA events around
    the call are a second clock."""
    if not hasattr(predict, "on_device"):
        raise Unavailable("takes only host arrays")
    clock, call, taken, seconds, found = time.perf_counter_ns, predict.on_device, [], [], []
    around: Any = _Events() if device == "cuda" else contextlib.nullcontext()
    for batch in batches:
        before = clock()
        with around:
            logits = call(batch)
        taken.append(clock() - before)
        found.append(logits.clone())  # the runtime may reuse their memory
        seconds += [around.seconds()] if device == "cuda" else []
    return Timed([nanoseconds * 1e-9 for nanoseconds in taken], seconds, [logits.cpu().numpy() for logits in found])


class _Events:
    """CUDA events around a block, which waits for the device at its end. Recorded once before anything is timed: the
    first record of an event creates it."""

    def __init__(self):
        import torch

        self.cuda = torch.cuda
        self.first, self.last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.first.record()
        self.last.record()

    def __enter__(self) -> None:
        self.first.record()

    def __exit__(self, *_: object) -> None:
        self.last.record()
        self.cuda.synchronize()

    def seconds(self) -> float:
        return self.first.elapsed_time(self.last) * 1e-3


def to_labels(predict: Any, artifact: Artifact, device: str) -> Any:
    """Wrap `predict` to take uint8 images [N, H, W, 3], normalised here unless the file does it, and to compute labels;
    it returns the logits."""
    normalize = {"cpu": _as_they_are, device: _as_they_are}
    if artifact.entry.input.normalized:
        import torch

        from harness.config import Normalization
        from harness.data.batches import Normalizer

        given = Normalization.model_validate(artifact.manifest.normalization)
        normalize = {name: Normalizer(given, torch.device(name), "contiguous") for name in normalize}

    def host(images: np.ndarray) -> np.ndarray:
        if artifact.entry.input.normalized:
            images = normalize["cpu"](torch.from_numpy(images)).numpy()
        logits = predict(images)
        logits.argmax(1)
        return logits

    if not hasattr(predict, "on_device"):
        return host

    def on_device(images: Any) -> Any:
        logits = predict.on_device(normalize[device](images))
        logits.argmax(1)
        return logits

    return Served(host, on_device)


def _as_they_are(images: Any) -> Any:
    return images
