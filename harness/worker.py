"""The process in which Ray runs one trial after another."""

import contextlib
import faulthandler
import gc
import os
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
from ray import tune
from ray.exceptions import RayActorError

from harness import checkpoint, results
from harness.ledger import Ledger


class ToldToGo(BaseException):
    """SIGTERM came while a trial was at work."""


class Worker(tune.Trainable):
    """Runs one trial after another in a process that stays: a step goes on to the next validation.

    A trial that fails is Ray's to place again, in a fresh process, as often as configured: whatever it held is free
    then. One whose process is told to go (SIGTERM) is placed again at no retry's cost.
    """

    loop: Any = None
    at_work = False

    def setup(self, config: dict[str, Any]) -> None:
        before = signal.getsignal(signal.SIGTERM)

        def terminate(number, frame):
            if self.at_work:
                raise ToldToGo
            before(number, frame)  # type: ignore[operator, misc]

        signal.signal(signal.SIGTERM, terminate)
        # What a process does before its first trial belongs to that one.
        age = time.time() - psutil.Process().create_time()
        ledger = Ledger("worker start", time.perf_counter() - age)
        ledger.enter("imports")
        gc.disable()  # what imports make lasts: collecting in between takes a fifth of their time
        from harness import execution

        execution.prepare_process(config["threads"])
        import torch._dynamo  # noqa: F401  which every optimiser imports

        gc.freeze()
        gc.enable()
        self.start(config, ledger)

    def start(self, config: dict[str, Any], ledger: Ledger) -> None:
        """Make ready for a trial. Nothing is written: Ray may start two processes for a trial, of which one runs it."""
        import torch

        from harness.trial import Job

        self.job, self.ledger, self.timeout, self.loop = Job.from_json(config["job"]), ledger, config["timeout"], None
        torch.set_num_threads(config["threads"])
        ledger.enter("idle")

    def begin(self) -> Generator[Any, None, dict[str, Any]]:
        """The trial's loop, in a folder that is this process's from now on."""
        from harness.trial import training

        folder = self.job.folder
        assert folder is not None
        run = folder.parent.parent
        if not (run / "run.json").is_file():
            raise FileNotFoundError(f"run={run}: not visible on node {os.uname().nodename}; give a shared folder")
        checkpoint.take(folder)
        ended = results.ended(folder)
        if ended is not None and results.is_done(ended):  # by a process that died before it could say so
            return _returning(ended)
        for name in (results.TRIAL, results.ERROR):  # of an attempt before
            (folder / name).unlink(missing_ok=True)
        return training(self.job, self.ledger)

    def step(self) -> dict[str, Any]:
        folder = self.job.folder
        assert folder is not None
        try:
            self.at_work = True
            with _ending_where_it_hangs(folder, self.timeout):
                self.loop = self.loop or self.begin()
                row, record = next(self.loop)
            return {**row, "record": {name: record[name] for name in ("metrics", "timing", "environment")}}
        except ToldToGo:
            raise RayActorError(error_msg="its process was told to go (SIGTERM)", preempted=True) from None
        except checkpoint.Superseded:
            os._exit(1)
        except StopIteration as end:
            record = end.value
        finally:
            self.at_work = False
        checkpoint.leave(folder)
        if record["status"] in ("failed", "oom"):
            raise RuntimeError(record["error"])
        metrics, finished = record["metrics"], record["status"] == "finished"
        value = {name: metrics[name] if finished else float("nan") for name in ("val_accuracy", "val_loss")}
        return {"epoch": metrics.get("epochs", 0.0), **value, "recorded": True, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.start(new_config, Ledger("queue", self.ledger.mark))
        return True

    def cleanup(self) -> None:
        if self.loop is not None:
            self.loop.close()
            assert self.job.folder is not None
            checkpoint.leave(self.job.folder)


def _returning(record: dict[str, Any]) -> Generator[Any, None, dict[str, Any]]:
    """A loop that has nothing left to do."""
    yield from ()
    return record


@contextlib.contextmanager
def _ending_where_it_hangs(folder: Path, seconds: float | None) -> Iterator[None]:
    """End this process where what is within takes longer, and say in the trial's folder what it was at."""

    def end():
        try:
            with tempfile.TemporaryFile("w+") as stacks:
                faulthandler.dump_traceback(stacks)
                stacks.seek(0)
                said = f"timed out: no validation in {seconds:g} s (resources.timeout_seconds)\n\n{stacks.read()}"
            checkpoint.write_atomically(folder / results.ERROR, said)
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
