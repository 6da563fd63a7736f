"""The configuration of the stages and of each command: every key outside `trial.` and `data.`."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from harness.config.trial import (
    MOST_SEED,
    MOST_THREADS,
    Data,
    Finite,
    Seconds,
    Strict,
    Trial,
    plugin_field,
)

LONGEST_NAME, LONGEST_PATH = 200, 3_000  # bytes: our own names below it need some


def place(path: Path) -> Path:
    """The absolute path of a folder that is written to. Raises ValueError where its name would be a mistake."""
    if not str(path).isprintable():
        raise ValueError("has control characters, or is not UTF-8; give another name")
    try:
        found = Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{error}; give the path without ~") from error
    if len(os.fsencode(found)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in found.parts):
        raise ValueError(f"is too long; give names of at most {LONGEST_NAME} bytes")
    return found


Stage = Literal["search", "confirm", "export", "benchmark", "report"]
STAGES: tuple[Stage, ...] = ("search", "confirm", "export", "benchmark", "report")


class Asha(Strict):
    grace_epochs: int = Field(
        1, ge=1, le=100_000, description="epochs that every trial trains before it may be stopped"
    )
    reduction_factor: Finite = Field(2.0, gt=1, le=1_000, description="n: 1/n of the trials pass each rung")


class Search(Strict):
    samples: int = Field(8, ge=1, le=100_000, description="trials of a search; sample 0 is the space's base")
    algorithm: Literal["random", "grid", "optuna"] = Field("random", description="how samples are drawn")
    scheduler: Literal["fifo", "asha"] = Field("fifo", description="asha stops the worse trials at rungs")
    metric: Literal["val_accuracy", "val_loss"] = Field("val_accuracy", description="ranks trials")
    asha: Asha = Asha()
    seed: int = Field(0, ge=0, le=MOST_SEED, description="draws the samples; also the first training seed")
    seeds: Annotated[int, Field(ge=1, le=1_000)] | Literal["auto"] = Field(
        3,
        description="repeats of each variant of an ablation; auto: 3, then 5, 8, 13 and 20 for claims not settled yet",
    )
    variants: list[str] | None = Field(None, description="variants of the space to train; default all")
    confirm: int = Field(
        3, ge=0, le=10_000, description="best configurations of a search to train again with fresh seeds"
    )
    confirm_seeds: int = Field(3, ge=1, le=1_000, description="fresh seeds per confirmed configuration")
    time_budget_seconds: Seconds | None = Field(None, gt=0, description="limit of a stage; its trials stop cleanly")

    @property
    def mode(self) -> Literal["max", "min"]:
        return "max" if self.metric == "val_accuracy" else "min"


class Resources(Strict):
    address: str | None = Field(
        None, description="Ray cluster to join: auto or host:port; default RAY_ADDRESS, or none"
    )
    gpus_per_trial: Finite | None = Field(
        None, ge=0, description="0: train on CPU; a fraction: trials share a GPU; default 1 if there are GPUs"
    )
    cpus_per_trial: Finite | None = Field(
        None, ge=0.01, le=4096, description="also the number of threads; default: cores divided by concurrent trials"
    )
    concurrency: int | None = Field(None, ge=1, le=10_000, description="concurrent trials; default: as many as fit")

    @field_validator("gpus_per_trial")
    @classmethod
    def _one_at_most(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1:
            raise ValueError("a trial uses one GPU; give 1, or a fraction for trials that share one")
        if gpus is not None and 0 < gpus < 0.01:
            raise ValueError("at most 100 trials share a GPU; give 0.01 or more, or 0 for the CPU")
        return gpus

    retries: int = Field(1, ge=0, le=1_000, description="retries of a trial that failed or whose process died")
    checkpoint_gib: Finite = Field(
        20.0,
        ge=0,
        le=1e6,
        description="disk for checkpoints, shared by concurrent trials; trials over their share have none",
    )
    timeout_seconds: Seconds | None = Field(
        None, gt=0, description="a trial without a new validation for this long is killed; default: no limit"
    )

    @property
    def device(self) -> Literal["auto", "cpu"]:
        """Device for the driver's own computations, such as reading the test set."""
        return "cpu" if self.gpus_per_trial == 0 else "auto"


class Export(Strict):
    formats: list[Literal["onnx", "onnx_rewritten", "onnx_int8", "onnx_fp16", "aoti"]] = Field(
        ["onnx", "onnx_rewritten", "onnx_int8"],
        min_length=1,
        description="ONNX as PyTorch exports it; rewritten: the same in operators that onnxruntime computes fast; "
        "int8: convolutions and matrix products in 8 bits; fp16: in half precision, for CUDA; "
        "aoti: compiled for this machine's CPU by AOTInductor",
    )
    max_accuracy_drop: float = Field(
        0.005,
        ge=0,
        lt=1,
        description="largest accuracy drop of int8 against float32, a fraction; layers stay float32 until it is met on "
        "the validation images",
    )
    uint8: bool = Field(True, description="also an ONNX file that takes uint8 images, normalisation inside")
    opset: int = Field(20, ge=18, le=23, description="opset of the ONNX files, checked after export")


class Benchmark(Strict):
    full: bool = Field(False, description="every runtime; else torch_eager and onnxruntime")
    runtimes: list[str] | None = plugin_field("export.runtimes", None)
    batch_sizes: list[Annotated[int, Field(ge=1, le=65_536)]] = Field(
        [1, 8, 64], min_length=1, max_length=100, description="images per call"
    )
    uint8: bool = Field(
        False, description="time uint8 images to labels, normalisation included; else normalised float32 to logits"
    )
    scope: Literal["host", "device", "both"] = Field(
        "host",
        description="host: arrays in main memory, copies to and from a GPU included; device: images and logits stay on "
        "the GPU; both: one after the other, the recommendation is for host",
    )
    replicates: Annotated[int, Field(ge=2, le=1_000)] | Literal["auto"] = Field(
        5,
        description="fresh processes per arm; intervals are over replicates; auto: 5, then 8, 13 and 20 until it is "
        "settled which arms are as fast as the fastest",
    )
    rounds: int = Field(
        2, ge=1, le=10_000, description="interleaved measurements per arm and batch size in a replicate"
    )
    round_seconds: Finite = Field(0.1, gt=0, le=3_600, description="shortest duration of a measurement")
    threads: int | None = Field(
        None, ge=1, le=MOST_THREADS, description="threads of every runtime on CPU; default: the number of cores"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is a GPU")
    batch_size: int | None = Field(
        None, ge=1, le=65_536, description="batch size that the recommendation targets; default: 64"
    )
    max_accuracy_drop: float = Field(
        0.005, ge=0, lt=1, description="allowed accuracy drop of the recommended arm from PyTorch float32, a fraction"
    )
    latency_ms: Finite | None = Field(
        None,
        gt=0,
        le=1e9,
        description="p90 latency limit of the recommended arm, ms; also measures the highest rate of single images, "
        "arriving at random, that each arm serves within it",
    )

    @model_validator(mode="after")
    def _recommends_what_is_measured(self) -> "Benchmark":
        if self.latency_ms is not None and self.scope == "device":
            raise ValueError(
                f"latency_ms={self.latency_ms:g}: single images arrive at the host; set scope=host or both"
            )
        if self.batch_size is not None and self.batch_size not in self.batch_sizes:
            raise ValueError(f"batch_size={self.batch_size}: is not in batch_sizes; choose from {self.batch_sizes}")
        return self

    @property
    def scopes(self) -> dict[str, str]:
        """The timed scopes (host, device) with their descriptions in inference.csv; the recommendation is for the
        first."""
        calls = {"host": "host arrays", "device": "device arrays"}
        if self.uint8:
            calls = {"host": "uint8 images to labels", "device": "uint8 images on the device to labels"}
        return {scope: calls[scope] for scope in calls if self.scope in (scope, "both")}

    @property
    def recommended_batch_size(self) -> int:
        if self.batch_size is not None:
            return self.batch_size
        return 64 if 64 in self.batch_sizes else max(self.batch_sizes)


class StageConfig(Strict):
    """Keys of every command that works on a run directory."""

    run: Path = Field(description="run directory")
    trust: bool = Field(False, description="run code files that the run directory names, and you have not")

    @field_validator("run")
    @classmethod
    def _absolute(cls, run: Path) -> Path:
        return place(run)


class ExportConfig(StageConfig):
    export: Export = Export()


class BenchmarkConfig(StageConfig):
    benchmark: Benchmark = Benchmark()


class ReportConfig(StageConfig):
    pass


class Tune(Strict):
    space: str = plugin_field("tune_spaces", ...)
    run: Path | None = Field(None, description="run directory; default runs/<space>-<digest>")
    stages: list[Stage] = Field(list(STAGES), min_length=1, description="stages to run")
    dry_run: bool = Field(False, description="print the planned trials and an estimate of their cost, run nothing")
    trust: bool = Field(False, description="run code files that the run directory names, and you have not")
    other_code: bool = Field(False, description="accept trials of other code in the run; trial.json records the code")
    trial: Trial = Trial()
    data: Data = Data()
    search: Search = Search()
    resources: Resources = Resources()
    export: Export = Export()
    benchmark: Benchmark = Benchmark()

    @field_validator("run")
    @classmethod
    def _absolute(cls, run: Path | None) -> Path | None:
        return None if run is None else place(run)
