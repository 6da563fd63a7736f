"""The random order and augmentation of an epoch, applied to batch tensors on the device."""

from dataclasses import dataclass

import torch
from torch import nn

from harness.config import Trial


@dataclass(frozen=True)
class Draws:
    """Random choices of an epoch: `rows` [n], `flips` bool [n], `shifts` [n, 2] (row, column) in pixels, or None."""

    rows: torch.Tensor
    flips: torch.Tensor | None
    shifts: torch.Tensor | None

    @classmethod
    def of(cls, rows: torch.Tensor, trial: Trial, seed: int) -> "Draws":
        """Draw the choices of an epoch on the CPU, so that they are the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(rows), generator=generator)
        flips = torch.rand(len(rows), generator=generator) < 0.5
        shifts = torch.randint(0, 2 * trial.augmentation.crop_padding + 1, (len(rows), 2), generator=generator)
        return cls(
            rows[order.to(rows.device)],
            flips.to(rows.device) if trial.augmentation.flip else None,
            shifts.to(rows.device) if trial.augmentation.crop_padding else None,
        )

    def batch(self, number: int, size: int) -> "Draws":
        part = slice(number * size, (number + 1) * size)
        flips, shifts = (None if t is None else t[part] for t in (self.flips, self.shifts))
        return Draws(self.rows[part], flips, shifts)


def augment(images: torch.Tensor, draws: Draws, padding: int) -> torch.Tensor:
    """Per-image horizontal flip and padded crop (black border) of uint8 images [B, H, W, 3]."""
    if draws.flips is not None:
        images = torch.where(draws.flips[:, None, None, None], images.flip(2), images)
    if draws.shifts is not None:
        count, height, width, _ = images.shape
        padded = nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
        batch = torch.arange(count, device=images.device)[:, None, None]
        rows = (draws.shifts[:, 0, None] + torch.arange(height, device=images.device))[:, :, None]
        columns = (draws.shifts[:, 1, None] + torch.arange(width, device=images.device))[:, None, :]
        images = padded[batch, rows, columns]
    return images
