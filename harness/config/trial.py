"""The configuration of one trial and of its data: every key under `trial.` and `data.`, its type, range and meaning."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Larger values are mistakes: they would hang, or need more memory than there is.
MOST_THREADS, MOST_SECONDS, MOST_SEED = 512, 1e8, 2**31 - 1
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(allow_inf_nan=False, le=MOST_SECONDS)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Channels = tuple[Finite, Finite, Finite]


def plugin_field(folder: str, default: Any) -> Any:
    """A field that names files of a plugin folder; `--help` lists them with the key."""
    return Field(default, description=f"from {folder.replace('.', '/')}/", json_schema_extra={"folder": folder})


class Strict(BaseModel):
    """Base of the models: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(Strict):
    name: Literal["sgd", "adam", "adamw"] = Field("sgd", description="torch.optim's SGD, Adam or AdamW")
    lr: Finite = Field(5e-2, gt=0, le=1e30, description="learning rate at the schedule's peak")
    momentum: Fraction = Field(0.0, description="sgd only; Adam's beta1 is 0.9")
    nesterov: bool = Field(False, description="Nesterov momentum, sgd only")
    weight_decay: Finite = Field(0.0, ge=0, le=1e6, description="L2 for sgd and adam, decoupled for adamw")

    @model_validator(mode="after")
    def _momentum_is_of_sgd(self) -> "Optimizer":
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs optimizer.name=sgd and optimizer.momentum above 0")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"momentum={self.momentum} applies to sgd, not to {self.name}; set optimizer.momentum=0")
        return self


class Schedule(Strict):
    name: Literal["constant", "linear", "cosine", "one_cycle"] = Field(
        "constant", description="learning rate schedule; linear and cosine decay to 0"
    )
    warmup_epochs: Finite = Field(
        0.0, ge=0, le=100_000, description="linear warm-up from 0 before the schedule (not one_cycle)"
    )


class Augmentation(Strict):
    flip: bool = Field(False, description="random horizontal flip of each training image")
    crop_padding: int = Field(0, ge=0, le=64, description="pad by this many pixels, then crop at random; 0: off")


class Normalization(Strict):
    mean: Channels = Field((0.5, 0.5, 0.5), description="per channel, of pixels in [0, 1]")
    std: Channels = Field((0.25, 0.25, 0.25), description="per channel, of pixels in [0, 1]")

    @field_validator("std")
    @classmethod
    def _positive(cls, std: Channels) -> Channels:
        if min(std) <= 0:
            raise ValueError("must be above 0 in every channel")
        return std


class Trial(Strict):
    """One training: everything but the seed and the data."""

    architecture: str = plugin_field("architectures", "final")
    options: dict[str, Any] = Field(default_factory=dict, description="trial.options.NAME=VALUE: network option")
    epochs: int = Field(10, ge=1, le=100_000, description="upper limit; early_stop may end a trial sooner")
    batch_size: int = Field(64, ge=1, le=1_000_000, description="the last partial batch of an epoch is dropped")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    augmentation: Augmentation = Augmentation()
    normalization: Normalization = Normalization()
    label_smoothing: Fraction = Field(0.0, description="of the training loss")
    gradient_clip: Finite | None = Field(None, gt=0, description="largest global L2 norm of the gradients")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="autocast (AMP); auto: bfloat16 where the device computes it natively, else float32"
    )
    plan: Literal["auto", "rule"] = Field(
        "auto",
        description="decides compile=auto and memory_format=auto; auto: measured once a run if training is long "
        "enough to pay for it; rule: eager and channels_last",
    )
    compile: Literal[
        "auto",
        "off",
        "kernels",
        "captured-eager",
        "default",
        "reduce-overhead",
        "max-autotune",
        "max-autotune-no-cudagraphs",
        "captured",
    ] = Field(
        "auto",
        description="torch.compile's mode; kernels: the harness's own activations, poolings and convolutions (CPU); "
        "captured-eager: the whole step as one CUDA graph; captured: the same with the compiled network",
    )
    memory_format: Literal["auto", "channels_last", "contiguous"] = Field("auto", description="NHWC or NCHW in memory")
    validations_per_epoch: int = Field(
        2, ge=1, le=10_000, description="evenly spaced, the last at the end of the epoch"
    )
    early_stop: int | None = Field(
        None,
        ge=2,
        le=1_000_000,
        description="n: stop when the oldest of the last n validation losses is the lowest of them",
    )
    keep: Literal["best", "last"] = Field("best", description="weights kept: best validation accuracy, or last")

    @field_validator("options")
    @classmethod
    def _are_values_of_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                text = repr(value)[:60]
                raise ValueError(f"{name}={text}: give finite numbers, text, or lists of these") from error
        return options

    cache_features: bool = Field(
        True, description="compute the features of frozen layers once, if there is no augmentation"
    )
    checkpoint_seconds: Seconds | None = Field(
        30.0,
        ge=0,
        description="shortest time between checkpoints, which are written at the end of an epoch; none: no "
        "checkpoints, an interrupted trial starts again",
    )


class Data(Strict):
    name: str = plugin_field("harness.data.datasets", "cifar10")
    root: Path | None = Field(None, description="folder of the files; cifar10 is downloaded there if absent")
    size: int | None = Field(None, ge=1, le=4096, description="images: resize to this side length in pixels")
    limit: int | None = Field(
        None, ge=2, le=10**9, description="only the first n training images of each class, before any are held out"
    )
    classes: list[str] | None = Field(
        None, min_length=2, max_length=100_000, description="classes to use, in this order; default all"
    )
    validation: Fraction = Field(
        0.1,
        gt=0,
        description="fraction of each class held out for validation; without a test part, as much again for test",
    )
    split_seed: int = Field(
        0, ge=0, le=MOST_SEED, description="draws the images held out: validation, and test where there is no test part"
    )

    @field_validator("root")
    @classmethod
    def _absolute(cls, root: Path | None) -> Path | None:
        return None if root is None else Path(root).expanduser().absolute()
