"""One optimisation step for a device: batch preparation, autocast, forward, backward, update.

Images stay uint8 [N, H, W, C] on the device; augmentation and normalisation work on the batch tensor there. A batch's
random draws come in from outside, so that a step has no random state of its own but dropout's.
"""

import math
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from harness.config import Normalization, Schedule, Trial
from harness.errors import BadInput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """How a trial's step is executed on this device: what `auto` came to."""

    device: str
    precision: str
    compile: str
    channels_last: bool
    threads: int

    @classmethod
    def of(cls, trial: Trial, device: torch.device) -> "Plan":
        """BadInput where the device cannot do what was asked."""
        precision, compile_mode = trial.precision, trial.compile
        if precision == "auto":
            precision = "bfloat16" if _native_bfloat16(device) else "float32"
        if precision == "float16" and device.type != "cuda":
            raise BadInput("trial.precision=float16: needs a CUDA device; use bfloat16 or float32 on CPU")
        if compile_mode == "auto":
            compile_mode = "default" if device.type == "cuda" and compiler(device.type) else "off"
        if compile_mode != "off" and not compiler(device.type):
            raise BadInput(f"trial.compile={compile_mode}: no C++ compiler on this machine; install g++ or use off")
        return cls(device.type, precision, compile_mode, trial.channels_last, torch.get_num_threads())


def compiler(device: str) -> str | None:
    """The compiler that torch.compile calls, if there is one: C++ for the CPU, C for Triton's launchers on CUDA."""
    names = ("CXX", "g++", "clang++") if device == "cpu" else ("CC", "gcc", "clang", "cc")
    candidates = (os.environ.get(names[0]), *names[1:])
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in all supported ones
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Mixed precision as named; float32 is no autocast at all."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, DTYPES[precision])


class Normalizer:
    """uint8 images [N, H, W, 3] -> normalised float images [N, 3, H, W] (in channels_last memory, unless asked)."""

    def __init__(self, normalization: Normalization, device: torch.device, channels_last: bool = True):
        # pixel / 255 - mean) / std as one multiplication and one addition
        scale = [1 / (255 * std) for std in normalization.std]
        shift = [-mean / std for mean, std in zip(normalization.mean, normalization.std, strict=True)]
        self.scale = torch.tensor(scale, device=device)
        self.shift = torch.tensor(shift, device=device)
        self.channels_last = channels_last

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        normalised = torch.addcmul(self.shift, images.float(), self.scale).permute(0, 3, 1, 2)
        return normalised if self.channels_last else normalised.contiguous()


@dataclass(frozen=True)
class Draws:
    """The random choices of one epoch: `rows` [n], `flips` bool [n], `shifts` [n, 2] in pixels; None where unused."""

    rows: torch.Tensor
    flips: torch.Tensor | None
    shifts: torch.Tensor | None

    @classmethod
    def of(cls, rows: torch.Tensor, trial: Trial, seed: int) -> "Draws":
        """Drawn on the CPU, so that every device sees the same ones."""
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


def learning_rate_factor(schedule: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Of the peak rate, for the 0-based `step` of `total_steps`.

    one_cycle is that of torch.optim.lr_scheduler.OneCycleLR at its defaults (30 % cosine rise from 1/25, cosine fall
    to 1/250,000), as in Smith and Topin, arXiv 1708.07120.
    """
    if schedule.name == "one_cycle":
        peak = 0.3 * total_steps - 1
        if step <= peak:
            return _cosine(1 / 25, 1.0, step / max(peak, 1))
        return _cosine(1.0, 1 / 250_000, (step - peak) / max(total_steps - 1 - peak, 1))
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total_steps - warmup, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": _cosine(1.0, 0.0, done)}[schedule.name]


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def make_optimizer(network: nn.Module, trial: Trial) -> torch.optim.Optimizer:
    """torch.optim's optimiser over what is to be trained, in its fused form (one kernel instead of many)."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    chosen = trial.optimizer
    if chosen.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=chosen.lr,
            momentum=chosen.momentum,
            nesterov=chosen.nesterov,
            weight_decay=chosen.weight_decay,
            fused=True,
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[chosen.name]
    return kind(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=True)


def to_device(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The network on the device in that memory layout; from then on float32 on CUDA means float32, not TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    return network.to(device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def compiled(network: nn.Module, mode: str):
    """torch.compile, which falls back to eager after so many recompilations in one process with a mere warning: so
    what earlier trials compiled is forgotten (the cache on disk remains), and reaching the limit is an error."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(network, mode=mode)


class Step:
    """`step(images, labels, draws, rate)` trains `network` on one batch and returns sums that stay on the device."""

    def __init__(self, network: nn.Module, trial: Trial, plan: Plan, device: torch.device):
        self.trial, self.plan, self.device = trial, plan, device
        self.network = network
        self.normalize = Normalizer(trial.normalization, device, plan.channels_last)
        self.optimizer = make_optimizer(network, trial)
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "float16")
        self.loss = nn.CrossEntropyLoss(label_smoothing=trial.label_smoothing)
        # Only the network is compiled: with autocast inside, PyTorch would not cache the compiled graph.
        self.forward = network if plan.compile == "off" else compiled(network, plan.compile)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, draws: Draws, rate: float) -> torch.Tensor:
        """`images` uint8 [B, H, W, 3], `labels` [B] -> [loss * B, correct] float32, not yet synchronised."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs = self.normalize(augment(images, draws, self.trial.augmentation.crop_padding))
        with autocast(self.plan.precision, self.device):
            logits = self.forward(inputs)
        loss = self.loss(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.trial.gradient_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.trial.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        correct = (logits.detach().argmax(1) == labels).sum()
        return torch.stack((loss.detach() * len(labels), correct.float()))
