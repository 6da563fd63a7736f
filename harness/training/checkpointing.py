"""Checkpoints of a trial, from which it resumes after an interruption."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.run import checkpoints
from harness.run.records import HistoryRow, Resumption, TrialRecord
from harness.run.storage import Json
from harness.training.step import Step


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the values saved with them: `of` (everything that the trial's result depends on), epoch,
    history, timing, `continued`, and the state of the gradient scaler."""

    tensors: Mapping[str, torch.Tensor]
    of: Json
    epoch: int
    history: list[HistoryRow]
    timing: Json
    continued: list[Json]
    scaler: Json

    def step_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors of the network and the optimiser, for Step.restore."""
        return {name: tensor for name, tensor in self.tensors.items() if not name.startswith(KEPT)}

    def kept_tensors(self) -> dict[str, torch.Tensor]:
        """The kept weights so far, by name."""
        return {name.removeprefix(KEPT): tensor for name, tensor in self.tensors.items() if name.startswith(KEPT)}


KEPT = "best."


class Checkpointer:
    """Saves checkpoints, at ends of epochs only, so that they need no random state."""

    def __init__(self, folder: Path | None, seconds: float | None, most_bytes: float, of: Mapping[str, object]):
        """`seconds`: minimum time between checkpoints; `folder`: the trial's. Where either is None, none are saved.

        `most_bytes`: limit for a new checkpoint and the two before it, which are removed once it is verified. `of`:
        everything that the trial's result depends on; checkpoints with a different `of` are ignored.
        """
        self.folder, self.seconds, self.most_bytes = folder, seconds, most_bytes
        self.of = json.loads(json.dumps(of))
        self.saved = time.monotonic()

    def newest(self, record: TrialRecord) -> Checkpoint | None:
        """This trial's newest intact checkpoint, or None.

        Records in `record.continued` from which epochs the trial resumed and which checkpoints were corrupt.
        """
        corrupt: list[str] = []
        found: Checkpoint | None = None
        for path in checkpoints.checkpoint_files(self.folder) if self.folder and self.seconds is not None else []:
            try:
                tensors, about = checkpoints.load_checkpoint(path)
            except ValueError:
                corrupt.append(path.name)
                continue
            if about["of"] == self.of:
                found = Checkpoint(tensors, **about)
                break
        if found is not None or corrupt:
            earlier = [Resumption.model_validate(one) for one in found.continued] if found else []
            record.continued = [*earlier, Resumption(epoch=found.epoch if found else 0, torn=corrupt)]
        return found

    def save(
        self,
        epoch: int,
        step: Step,
        kept: Mapping[str, torch.Tensor],
        history: list[HistoryRow],
        record: TrialRecord,
    ) -> None:
        """Save a checkpoint after `epoch` epochs, if one is due; where it would be too large, record that instead."""
        if self.folder is None or self.seconds is None or time.monotonic() - self.saved < self.seconds:
            return
        about = {
            "of": self.of,
            "epoch": epoch,
            "history": history,
            "timing": record.timing.to_json(),
            "continued": [one.to_json() for one in record.continued],
            "scaler": step.scaler.state_dict(),
        }
        tensors = {**step.state(), **{f"{KEPT}{name}": tensor for name, tensor in kept.items()}}
        each = sum(tensor.nbytes for tensor in tensors.values())
        if 3 * each > self.most_bytes:
            record.environment.not_checkpointed = (
                f"three checkpoints of {each:,} bytes are more than {self.most_bytes:,.0f}, its share of "
                "resources.checkpoint_gib"
            )
            return
        checkpoints.save_checkpoint(self.folder, epoch, tensors, about)
        self.saved = time.monotonic()
