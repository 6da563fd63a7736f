"""python -m harness.search.guard PID FOLDER: kills the Ray processes that PID leaves behind when it is killed.

Ray's server and node exit together with the process that started them, but their agents try for a minute to notify the
server, and starting workers try as long to find their node. The guard polls the descendants of PID. Its standard input
is a pipe from PID: on EOF without data, it kills surviving descendants and processes whose command line mentions
FOLDER (Ray's sockets), then removes FOLDER.
"""

import contextlib
import select
import shutil
import sys
import time

import psutil

LOOK_SECONDS, LATECOMERS_SECONDS = 3.0, 10.0


def main(pid: int, folder: str) -> None:
    guarded = psutil.Process(pid)
    known: list[psutil.Process] = []
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        with contextlib.suppress(psutil.Error):
            known = guarded.children(recursive=True)
    if sys.stdin.read(1):
        return
    kill_all(known)
    started = time.monotonic()
    while time.monotonic() - started < LATECOMERS_SECONDS:
        kill_all([process for process in psutil.process_iter() if mentions(process, folder)])
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)


def mentions(process: psutil.Process, folder: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(folder in word for word in process.cmdline())
    return False


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process != psutil.Process():
                process.kill()  # no effect if the PID has been reused


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
