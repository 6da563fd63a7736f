"""Checkpoints of a trial, from which it goes on after an interruption."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness import checkpoint
from harness.step import Step


class Saver:
    """Checkpoints of a trial, at the ends of epochs, so that no random state belongs to them."""

    def __init__(self, folder: Path | None, seconds: float | None, most_bytes: float, of: Mapping[str, Any]):
        """At most one in so many `seconds`, in the trial's `folder`; none of either: no checkpoints.

        `most_bytes`: of a new one and the two that are there until it is verified. `of`: what the trial's result
        depends on. What another job, other images, code or plan left is none of its own.
        """
        self.folder, self.seconds, self.most_bytes = folder, seconds, most_bytes
        self.of = json.loads(json.dumps(of))
        self.saved = time.monotonic()

    def newest(self, record: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors of this trial's newest whole checkpoint, none where there is none, and what was saved about it.

        `continued` of the record says from which epochs the trial went on, and which checkpoints were torn.
        """
        torn: list[str] = []
        tensors, about = dict[str, torch.Tensor](), dict[str, Any]()
        for path in checkpoint.generations(self.folder) if self.folder and self.seconds is not None else []:
            try:
                tensors, about = checkpoint.load_generation(path)
            except ValueError:
                torn.append(path.name)
                continue
            if about["of"] == self.of:
                break
            tensors, about = {}, {}
        if tensors or torn:
            record["continued"] = [*about.get("continued", []), {"epoch": about.get("epoch", 0), "torn": torn}]
        return tensors, about

    def save(
        self,
        epoch: int,
        step: Step,
        best: Mapping[str, torch.Tensor],
        history: list[dict[str, Any]],
        record: dict[str, Any],
    ) -> None:
        """After that many epochs, if it is time to. The record says where they would be too large."""
        if self.folder is None or self.seconds is None or time.monotonic() - self.saved < self.seconds:
            return
        about = {
            "of": self.of,
            "epoch": epoch,
            "history": history,
            "timing": record["timing"],
            "continued": record.get("continued", []),
            "scaler": step.scaler.state_dict(),
        }
        tensors = {**step.state(), **{f"best.{name}": tensor for name, tensor in best.items()}}
        each = sum(tensor.nbytes for tensor in tensors.values())
        if 3 * each > self.most_bytes:
            record["environment"]["not_checkpointed"] = (
                f"three checkpoints of {each:,} bytes are more than {self.most_bytes:,.0f}, its share of "
                "resources.checkpoint_gib"
            )
            return
        checkpoint.save_generation(self.folder, epoch, tensors, about)
        self.saved = time.monotonic()
