"""python -m benchmarks.inference.server: one arm of the inference benchmark in its own process.

Between requests it blocks in a read, so that it takes no time from the arm being timed.
"""

import contextlib
import gc
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inference import calls
from export.artifact_server import ArtifactServer
from harness.run.child import serve
from harness.run.storage import Json

WARM_UP_CALLS, WARM_UP_SECONDS = 2, 0.2  # at least
WARM_UP_LIMIT_SECONDS = 10.0  # after the first call, which may compile
SETTLED = 0.1  # calls have settled if a block is faster than all before it by a smaller share
ROTATED = 1024  # images that calls rotate through, at least


class RuntimeServer(ArtifactServer):
    """Serves one arm; each public method handles a request."""

    device = "cpu"
    held_bytes = peak_held_bytes = 0  # of GPU memory

    def load(self, folder: str, name: str, runtime: str, device: str, threads: int, images: str) -> Json:
        """As ArtifactServer does; calls the runtime once, and tells in which scopes it can be timed."""
        told = super().load(folder, name, runtime, device, threads, images)
        if self.images.dtype == np.uint8:
            self.predict = calls.to_labels(self.predict, self.artifact, device)
        loaded = time.perf_counter()
        self.predict(np.ascontiguousarray(self.images[:2]))
        on_device = device == "cuda" and hasattr(self.predict, "on_device")
        scopes = ["host", "device"] if on_device else ["host"]
        return told | {"first_call_seconds": time.perf_counter() - loaded, "scopes": scopes}

    def warm_up(self, batch_size: int, answers: str, scope: str = "host") -> Json:
        """Call with this batch size until compilation and caches no longer change the time of a call.

        `answers`: the .npy file of the checked logits, with which those of later calls are compared. `scope`: whether
        images and logits are host arrays or tensors on the device.
        """
        self.scope = scope
        self.checked = np.load(answers, mmap_mode="r")
        rotated = max(1, min(len(self.images), max(ROTATED, batch_size)) // batch_size)
        # Images repeat where a batch is larger than the data set.
        self.rows = [np.arange(i * batch_size, (i + 1) * batch_size) % len(self.images) for i in range(rotated)]
        self.batches: list[Any] = [np.ascontiguousarray(self.images[rows]) for rows in self.rows]
        if scope == "device":
            import torch

            self.batches = [torch.from_numpy(batch).to(self.device) for batch in self.batches]
        self.turn = 0
        blocks = [self._calls(1).seconds[0]]
        started, count = time.perf_counter(), 1
        while (spent := time.perf_counter() - started) < WARM_UP_LIMIT_SECONDS:
            settled = len(blocks) > 1 and blocks[-1] > (1 - SETTLED) * min(blocks[:-1])
            if settled and len(blocks) >= WARM_UP_CALLS and spent >= WARM_UP_SECONDS:
                break
            taken = self._calls(count).seconds
            blocks.append(sum(taken) / len(taken))
            count = max(1, min(1000, round(WARM_UP_SECONDS / 4 / blocks[-1])))  # blocks long enough for the clock
        else:
            settled = False
        return {"call_seconds": min(blocks), "settled": settled}

    def measure(self, calls: int) -> Json:
        """Seconds of each of `calls` calls by the host's clock, on the device also by its own (`event_seconds`), and
        the largest difference of their logits from the checked ones (`away`)."""
        before = time.process_time()
        started = time.perf_counter()
        first, done = self.turn, self._calls(calls)
        wall, own = time.perf_counter() - started, time.process_time() - before
        away = max(
            float(np.abs(logits - self.checked[self.rows[number % len(self.rows)]]).max())
            for number, logits in enumerate(done.logits, first)
        )
        return {"seconds": done.seconds, "event_seconds": done.event_seconds, "away": away, "cores": own / wall}

    def _calls(self, count: int) -> calls.Timed:
        batches = [self.batches[number % len(self.batches)] for number in range(self.turn, self.turn + count)]
        gc.collect()
        gc.disable()
        try:
            done = calls.timed(self.predict, self.scope, self.device, batches)
        finally:
            gc.enable()
        self.turn += count
        return done

    def serve(self, rate: float, seconds: float, seed: int) -> Json:
        """Latencies in seconds of single images that arrive at random, `rate` per second on average (Poisson).

        Images are processed one at a time, in order; latency counts from arrival, so it includes time in the queue.
        """
        gaps = np.random.default_rng(seed).exponential(1 / rate, max(2, round(rate * seconds)))
        arrivals, latencies = np.cumsum(gaps), []
        images = [np.ascontiguousarray(self.images[i : i + 1]) for i in range(min(len(self.images), ROTATED))]
        started = time.perf_counter()
        for number, arrival in enumerate(arrivals):
            wait = started + arrival - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            self.predict(images[number % len(images)])
            latencies.append(time.perf_counter() - started - arrival)
        return {"latencies": latencies}

    def operators(self, batch_size: int, calls: int) -> Json:
        """Seconds per call by operator; empty where the runtime cannot be profiled."""
        from benchmarks.inference import operators

        images = np.ascontiguousarray(self.images[np.arange(batch_size) % len(self.images)])
        found: dict[str, float] = {}
        if self.device == "cpu" and self.runtime == "onnxruntime":
            found = operators.of_onnxruntime(self.artifact.path, images, self.threads, calls)
        elif self.device == "cpu" and self.artifact.entry.format == "torch":
            found = operators.of_torch(lambda: self.predict(images), calls)
        return {"operators": found}

    def memory(self) -> Json:
        """Peak main memory of this process in bytes, or the current one where the peak is not known. On CUDA also peak
        GPU memory, without CUDA's own: read after each request, as runtimes release little during one."""
        import psutil

        device = {"peak_device_bytes": self.peak_held_bytes} if self.device == "cuda" else {}
        with contextlib.suppress(OSError):  # Linux; getrusage would include the parent's memory at the start
            status = Path("/proc/self/status").read_text()
            (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
            return {"peak_bytes": int(line.split()[1]) * 1024} | device
        info = psutil.Process().memory_info()
        return {"peak_bytes": getattr(info, "peak_wset", info.rss)} | device

    @contextlib.contextmanager
    def watching(self, request: Mapping[str, Any]) -> Iterator[None]:
        """Track how much GPU memory a request takes, from the free memory: other arms are idle during it."""
        self.device = request.get("device", self.device)
        if self.device != "cuda":
            yield
            return
        import torch

        free, _ = torch.cuda.mem_get_info()
        try:
            yield
        finally:
            self.held_bytes += free - torch.cuda.mem_get_info()[0]
            self.peak_held_bytes = max(self.peak_held_bytes, self.held_bytes)


def main() -> int:
    arm = RuntimeServer()
    return serve(arm, arm.watching)


if __name__ == "__main__":
    sys.exit(main())
