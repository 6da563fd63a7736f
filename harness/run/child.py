"""A child process that answers requests, with limits on time and memory: native code that reads files of others runs
there, so that a crash or a hang ends the child alone.

The parent holds a `Child` of a module that calls `serve`. A request and its answer are one line of JSON each.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import IO, Any

from harness.config.plugins import TOP
from harness.run.storage import Json

MEMORY = "HARNESS_CHILD_MEMORY"  # limit in bytes, in the child's environment
PDEATHSIG = 1  # of prctl(2): the signal when the thread that started this process ends


class ChildError(RuntimeError):
    """The child raised an exception: `kind` is its class's name, the message is its own."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class ChildDied(RuntimeError):
    """The child crashed, or was killed because it did not answer in time."""


class Child:
    """A process of `module`. `memory_bytes` limits its heap (on Linux); `errors` gets its standard error."""

    def __init__(
        self,
        module: str,
        *,
        memory_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
        errors: IO[str] | int = subprocess.DEVNULL,
    ):
        path = os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])])
        limit = {} if memory_bytes is None else {MEMORY: str(memory_bytes)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **(environment or {}), **limit, "PYTHONPATH": path},
        )
        self._received = b""

    def ask(self, do: str, seconds: float, **request: Any) -> Json:
        """The answer to a request. Raises ChildError where the child raised, ChildDied where it ended or took longer
        than `seconds`; it is gone then."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self.process.stdin.flush()
        answer: Json = json.loads(self._line(seconds))
        if "raised" in answer:
            raise ChildError(answer["raised"], answer["message"])
        return answer

    def _line(self, seconds: float) -> bytes:
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise ChildDied(f"no answer within {seconds:g} s")
                part = os.read(self.process.stdout.fileno(), 1 << 20)
                if not part:
                    raise ChildDied(_ending(self.process.wait()))
                self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]


def _ending(code: int) -> str:
    """How a process ended, from its exit code."""
    if code == -signal.SIGALRM:
        return "it took too long"
    if code < 0:
        return f"its process crashed ({signal.Signals(-code).name})"
    return f"its process ended with exit code {code}"


def serve(target: object, around: Callable[[Json], AbstractContextManager[object]] | None = None) -> int:
    """Answer each request (JSON: `do`, a public method of `target`, and its arguments) until standard input ends;
    `around` gives a context for a request. What libraries print goes to standard error."""
    limit_this_process()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., Json] = getattr(target, request.pop("do"))
        try:
            with around(request) if around else contextlib.nullcontext():
                answer = method(**request)
        except Exception as error:
            traceback.print_exc()
            message = " ".join(str(error).split())[:300] or "no message"
            answer = {"raised": type(error).__name__, "message": message}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def limit_this_process() -> None:
    """End this process with its parent, also where that is killed; apply the limit of memory that the parent gave."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)
    if memory := os.environ.get(MEMORY):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
