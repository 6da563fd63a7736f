"""python -m harness.guard PID FOLDER: ends what a process leaves behind when it is killed.

Ray's server and node end together with the process that started them, but their agents try for a minute to tell the
server so. This process remembers what there is below PID; when its standard input, a pipe from PID, is closed without
a word, it ends what of that still lives, and removes the FOLDER.
"""

import contextlib
import select
import shutil
import sys

import psutil

LOOK_SECONDS = 3.0


def main(pid: int, folder: str) -> None:
    guarded = psutil.Process(pid)
    known: list[psutil.Process] = []
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        with contextlib.suppress(psutil.Error):
            known = guarded.children(recursive=True)
    if sys.stdin.read(1):
        return
    for process in known:
        with contextlib.suppress(psutil.Error):
            if process != psutil.Process():
                process.kill()  # nothing if its number is another process's by now
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
