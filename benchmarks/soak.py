"""python -m benchmarks.soak [key=value ...]: an hour of trials whose worker process is killed once a minute.

Two sweeps of the same trials run side by side, one worker and one core each: in one the active worker is killed
repeatedly, the other is undisturbed. Both are then resumed with as many samples as the further one has begun, and
compared. `out`/kills.csv has the driver's resources before each kill: open files, processes, memory and disk space;
summary.json compares the last third of the kills with the first. Exit code 1 if the sweeps differ or a trial was lost.

    python -m benchmarks.soak minutes=60 out=soak
"""

import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field

from benchmarks.sweeps import Sweep, outcome, training_workers
from harness.config import Strict, command_line
from harness.run import storage, system
from harness.run.storage import Json
from harness.run.tables import csv_text

ONE = ("resources.concurrency=1", "resources.retries=3")
COLUMNS = ("seconds", "finished", "open_files", "processes", "memory_mib", "checkpoint_mib", "scratch_mib")


class Soak(Strict):
    minutes: float = Field(60.0, gt=0, description="how long to keep killing workers")
    every_seconds: float = Field(60.0, gt=0, description="mean time between kills")
    samples: int = Field(1500, ge=4, description="samples of the search: more than can finish in that time")
    seed: int = Field(0, ge=0, description="seed of the kill times, which vary by 10 % of every_seconds")
    out: Path = Field(Path("soak"), description="folder for kills.csv and summary.json")


def main(config: Soak) -> int:
    from harness.run.progress import Progress

    progress, draw = Progress(), random.Random(config.seed)
    rows: list[Json] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        killed, alone = (
            Sweep(Path(temporary) / name, *ONE, f"search.samples={config.samples}") for name in ("killed", "alone")
        )
        killed.start()
        alone.start()
        killed.until_running()
        started = time.monotonic()
        while (passed := time.monotonic() - started) < 60 * config.minutes:
            time.sleep(min(config.every_seconds * draw.uniform(0.9, 1.1), 60 * config.minutes - passed + 0.1))
            rows.append({"seconds": round(time.monotonic() - started, 1), **held(killed)})
            while not (targets := training_workers(killed.processes())):
                time.sleep(0.01)
            draw.choice(targets).kill()
            storage.write_atomically(config.out / "kills.csv", csv_text(COLUMNS, rows))
            progress.line(" ".join(f"{name}={value}" for name, value in rows[-1].items()))
        said = killed.said.read_text()
        for sweep in (killed, alone):
            assert sweep.process is not None
            sweep.process.send_signal(signal.SIGTERM)
            sweep.process.wait()
        begun = max(len(list(sweep.run.path.glob("trials/*"))) for sweep in (killed, alone))
        outcomes = []
        for sweep in (killed, alone):
            sweep.arguments.append(f"search.samples={begun}")
            sweep.arguments.remove(f"search.samples={config.samples}")
            sweep.start()
            code, last = sweep.wait(600)
            if code:
                raise RuntimeError(f"{sweep.run.path.parent.name} ends with exit code {code}: {last}")
            outcomes.append(outcome(sweep.run))
        summary = {
            "settings": config.model_dump(mode="json", exclude={"out"}),
            "kills": len(rows),
            "placed_again": said.count("continues from its last checkpoint"),
            "trials": len(outcomes[0]),
            "equal": outcomes[0] == outcomes[1],
            **compare_thirds(rows),
            "environment": system.environment().to_json(),
        }
    storage.write_json(config.out / "summary.json", summary)
    progress.line(", ".join(f"{name} {summary[name]}" for name in ("kills", "placed_again", "trials", "equal")))
    return 0 if summary["equal"] and summary["trials"] == begun else 1


def held(sweep: Sweep) -> Json:
    """Resources that the driver of a sweep holds now."""
    assert sweep.process is not None
    driver = psutil.Process(sweep.process.pid)
    files = [path for path in sweep.run.path.glob("trials/*/checkpoint-*") if path.exists()]
    opened = [Path(file.path) for file in driver.open_files()]
    scratch = {path for file in opened for path in file.parents if path.name.startswith("harness-ray-")}
    return {
        "finished": len(sweep.finished()),
        "open_files": driver.num_fds(),
        "processes": len(sweep.processes()),
        "memory_mib": round(driver.memory_info().rss / 2**20, 1),
        "checkpoint_mib": round(sizes(files), 2),
        "scratch_mib": round(sum(sizes(folder.rglob("*")) for folder in scratch), 2),
    }


def sizes(files: Any) -> float:
    """Disk usage of the files that exist, MiB."""
    total = 0
    for file in files:
        try:
            total += file.lstat().st_blocks * 512
        except OSError:  # deleted since it was listed
            continue
    return total / 2**20


def compare_thirds(rows: list[Json]) -> Json:
    """Medians of each figure over the first and over the last third of the kills."""
    from statistics import median

    third = max(1, len(rows) // 3)
    return {
        name: {"first": median(r[name] for r in rows[:third]), "last": median(r[name] for r in rows[-third:])}
        for name in COLUMNS[2:]
    }


if __name__ == "__main__":
    sys.exit(command_line.run_command(Soak, main, __doc__ or ""))
