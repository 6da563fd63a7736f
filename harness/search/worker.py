"""The worker process, in which Ray runs one trial after another."""

import contextlib
import faulthandler
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil
from ray import tune
from ray.exceptions import RayActorError

from harness.run import storage
from harness.run.records import ERROR_FILE, TRIAL_FILE, HistoryRow, TrialRecord, read_if_ended
from harness.run.storage import Json
from harness.training.timers import Timers

if TYPE_CHECKING:
    from harness.training.loop import Loop


class Preempted(BaseException):
    """SIGTERM arrived while a trial was running."""


def own_paths() -> Json:
    """The working directory of this process and the folders from which it imports."""
    return {"folder": str(Path.cwd()), "imports": [str(Path(place).absolute()) for place in sys.path]}


def take_paths(paths: Json) -> None:
    """Work in the folder of another process (`own_paths`), and import also from where it does: last, so that nothing
    there hides a package of this project."""
    with contextlib.suppress(OSError):  # may be missing on this node
        os.chdir(paths["folder"])
    sys.path += [place for place in paths["imports"] if place not in sys.path]


def call_with_paths(paths: Json, function: Callable[..., Json], *arguments: object) -> Json:
    """Call the function after `take_paths`."""
    take_paths(paths)
    return function(*arguments)


class TrialWorker(tune.Trainable):  # type: ignore[misc]  # ray has no types
    """Runs one trial after another in the same process; a step runs to the next validation.

    Ray retries a failed trial as often as configured, in a fresh process: the memory of the old one is free by then. A
    preempted trial, whose process received SIGTERM, is placed again without consuming a retry.
    """

    loop: "Loop | None" = None
    at_work = False

    def setup(self, config: Json) -> None:
        before = signal.getsignal(signal.SIGTERM)

        def terminate(number: int, frame: FrameType | None) -> None:
            if self.at_work:
                raise Preempted
            before(number, frame)  # type: ignore[operator, misc]

        signal.signal(signal.SIGTERM, terminate)
        take_paths(config["paths"])
        # The start-up time of a process is booked to its first trial.
        age = time.time() - psutil.Process().create_time()
        timers = Timers("worker start", time.perf_counter() - age)
        timers.enter("imports")
        gc.disable()  # objects made by imports stay: collecting would take a fifth of the time
        from harness.training import execution

        execution.prepare_process(config["threads"])
        import torch._dynamo  # noqa: F401  every optimiser imports it

        gc.freeze()
        gc.enable()
        self.start(config, timers)

    def start(self, config: Json, timers: Timers) -> None:
        """Prepare for a trial without writing: Ray may start two processes for a trial, and runs it in only one."""
        import torch

        from harness.training.job import TrainingJob

        self.job, self.timers, self.loop = TrainingJob.from_json(config["job"]), timers, None
        self.timeout: float | None = config["timeout"]
        torch.set_num_threads(config["threads"])
        timers.enter("idle")

    def begin(self) -> "Loop":
        """Acquire the trial's folder for this process and return the training loop."""
        from harness.training.loop import training_loop

        folder = self._folder()
        run = folder.parent.parent
        if not (run / "run.json").is_file():
            raise FileNotFoundError(f"run={run}: not visible on node {os.uname().nodename}; give a shared folder")
        storage.acquire(folder)
        ended = read_if_ended(folder)
        if ended is not None and ended.is_done:  # by a process that died before it reported this
            return _returning(ended)
        for name in (TRIAL_FILE, ERROR_FILE):  # of an earlier attempt
            (folder / name).unlink(missing_ok=True)
        return training_loop(self.job, self.timers)

    def _folder(self) -> Path:
        assert self.job.folder is not None
        return self.job.folder

    def step(self) -> Json:
        try:
            self.at_work = True
            with _ending_where_it_hangs(self._folder(), self.timeout):
                self.loop = self.loop or self.begin()
                row, record = next(self.loop)
            reported = record.model_dump(include={"metrics", "timing", "environment"}, exclude_unset=True)
            return {**row, "record": reported}
        except Preempted:
            raise RayActorError(error_msg="its process was preempted (SIGTERM)", preempted=True) from None
        except storage.Superseded:
            os._exit(1)
        except StopIteration as end:
            final: TrialRecord = end.value
        finally:
            self.at_work = False
        storage.release(self._folder())
        if final.status in ("failed", "oom"):
            raise RuntimeError(final.error)
        finished = final.status == "finished"
        value = {name: final.metrics.of(name) if finished else float("nan") for name in ("val_accuracy", "val_loss")}
        return {"epoch": final.metrics.epochs or 0.0, **value, "recorded": True, "done": True}

    def reset_config(self, new_config: Json) -> bool:
        self.cleanup()
        self.start(new_config, Timers("queue", self.timers.mark))
        return True

    def cleanup(self) -> None:
        if self.loop is not None:
            self.loop.close()
            storage.release(self._folder())


def _returning(record: TrialRecord) -> Generator[tuple[HistoryRow, TrialRecord], None, TrialRecord]:
    """The loop of a trial that has already ended."""
    yield from ()
    return record


@contextlib.contextmanager
def _ending_where_it_hangs(folder: Path, seconds: float | None) -> Iterator[None]:
    """Exit this process if the block takes longer than `seconds`, with its stack traces in the trial's error file."""

    def end() -> None:
        try:
            with tempfile.TemporaryFile("w+") as stacks:
                faulthandler.dump_traceback(stacks)
                stacks.seek(0)
                said = f"timed out: no validation in {seconds:g} s (resources.timeout_seconds)\n\n{stacks.read()}"
            storage.write_atomically(folder / ERROR_FILE, said)
        finally:
            os._exit(1)

    timer = threading.Timer(seconds, end) if seconds is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
