"""python -m benchmarks.saving [key=value ...]: what checkpoints cost a trial.

Pairs of trials in this process that differ only in `trial.checkpoint_seconds`: the default, and none. The two alternate
in half epochs, in an order drawn each time, so that a slowdown of the machine affects both; a trial's seconds exclude
those in which it waits for the other. As it waits half of the time, it gets twice the default interval: in its own time
it then saves as often as a trial alone. Reports how much longer the trial with checkpoints takes, with the 95 %
interval over pairs, and the time that its ledger booked for writing files. `out`: one row per trial.

    python -m benchmarks.saving data.name=images data.root=DIR data.limit=500
"""

import random
import sys
import tempfile
from pathlib import Path

from pydantic import Field

from harness.config import Data, Strict, Trial, command_line, plugin_field
from harness.run.storage import Json

COLUMNS = ("pair", "checkpoints", "seconds", "files_seconds", "saved")


class Saving(Strict):
    architecture: str = plugin_field("architectures", "final")
    epochs: int = Field(10, ge=2, description="epochs of each trial")
    precision: str = Field("float32", description="as trial.precision")
    compile: str = Field("kernels", description="as trial.compile")
    pairs: int = Field(6, ge=2, description="pairs of trials")
    data: Data = Data()
    out: Path = Field(Path("saving.csv"), description="output table, one row per trial")


def main(config: Saving) -> int:
    from harness.run import checkpoints
    from harness.run.progress import Progress
    from harness.run.tables import write_measured
    from harness.stats.intervals import ratio_interval
    from harness.training.job import TrainingJob
    from harness.training.loop import train_job, training_loop

    progress, order = Progress(), random.Random(0)
    rows: list[Json] = []
    base = {"architecture": config.architecture, "epochs": config.epochs, "optimizer": {"name": "adam", "lr": 5e-4}}
    base |= {"precision": config.precision, "compile": config.compile}
    twice = 2 * Trial.model_fields["checkpoint_seconds"].default  # each trial of a pair waits half of the time
    arms = {
        name: Trial.model_validate(base | {"checkpoint_seconds": seconds})
        for name, seconds in {"default": twice, "none": None}.items()
    }
    with tempfile.TemporaryDirectory() as top:
        train_job(TrainingJob(arms["none"].model_copy(update={"epochs": 1}), config.data))  # warms up
        for pair in range(config.pairs):
            folders = {name: Path(top) / f"{pair}-{name}" for name in arms}
            saved: dict[str, set[Path]] = {name: set() for name in arms}
            loops = {
                name: training_loop(TrainingJob(arm, config.data, folder=folders[name])) for name, arm in arms.items()
            }
            while loops:
                for name in order.sample(sorted(loops), len(loops)):
                    try:
                        next(loops[name])
                        saved[name].update(checkpoints.checkpoint_files(folders[name]))
                    except StopIteration as end:
                        del loops[name]
                        timing = end.value.timing
                        seconds = timing.wall_seconds - timing.ledger["idle"]
                        row = {"pair": pair, "checkpoints": name, "seconds": seconds, "saved": len(saved[name])}
                        rows.append(row | {"files_seconds": timing.ledger["checkpoint"]})
                        progress.line(f"pair {pair + 1} of {config.pairs}, {name}: {seconds:.1f} s")
            write_measured(config.out, COLUMNS, rows)
    taken = {name: [r["seconds"] for r in rows if r["checkpoints"] == name] for name in arms}
    ratio = ratio_interval(taken["default"], taken["none"])
    own_rows = [r for r in rows if r["checkpoints"] == "default"]
    files = sum(r["files_seconds"] for r in own_rows) / sum(taken["default"])
    progress.line(
        f"with checkpoints {ratio.mean:.4f} [{ratio.low:.4f}, {ratio.high:.4f}] times as long, {ratio.n} pairs; "
        f"{sum(r['saved'] for r in own_rows)} checkpoints; {100 * files:.2f} % of the time went into all files"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run_command(Saving, main, __doc__ or ""))
