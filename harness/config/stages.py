"""The configuration of the stages and of each command: every key outside `trial.` and `data.`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from harness.config.trial import Data, Finite, Strict, Trial, plugin_field

Stage = Literal["search", "confirm", "export", "benchmark", "report"]
STAGES: tuple[Stage, ...] = ("search", "confirm", "export", "benchmark", "report")


class Asha(Strict):
    grace_epochs: int = Field(1, ge=1, description="epochs that every trial trains before it may be stopped")
    reduction_factor: Finite = Field(2.0, gt=1, description="n: 1/n of the trials pass each rung")


class Search(Strict):
    samples: int = Field(8, ge=1, description="trials of a search; sample 0 is the space's base")
    algorithm: Literal["random", "grid", "optuna"] = Field("random", description="how samples are drawn")
    scheduler: Literal["fifo", "asha"] = Field("fifo", description="asha stops the worse trials at rungs")
    metric: Literal["val_accuracy", "val_loss"] = Field("val_accuracy", description="ranks trials")
    asha: Asha = Asha()
    seed: int = Field(0, ge=0, description="draws the samples; also the first training seed")
    seeds: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        3,
        description="repeats of each variant of an ablation; auto: 3, then 5, 8, 13 and 20 for claims not settled yet",
    )
    variants: list[str] | None = Field(None, description="variants of the space to train; default all")
    confirm: int = Field(3, ge=0, description="best configurations of a search to train again with fresh seeds")
    confirm_seeds: int = Field(3, ge=1, description="fresh seeds per confirmed configuration")
    time_budget_seconds: float | None = Field(None, gt=0, description="limit of a stage; its trials stop cleanly")

    @property
    def mode(self) -> Literal["max", "min"]:
        return "max" if self.metric == "val_accuracy" else "min"


class Resources(Strict):
    address: str | None = Field(
        None, description="Ray cluster to join: auto or host:port; default RAY_ADDRESS, or none"
    )
    gpus_per_trial: float | None = Field(
        None, ge=0, description="0: train on CPU; a fraction: trials share a GPU; default 1 if there are GPUs"
    )
    cpus_per_trial: float | None = Field(
        None, gt=0, description="also the number of threads; default: cores divided by concurrent trials"
    )
    concurrency: int | None = Field(None, ge=1, description="concurrent trials; default: as many as fit")

    @field_validator("gpus_per_trial")
    @classmethod
    def _one_at_most(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1:
            raise ValueError("a trial uses one GPU; give 1, or a fraction for trials that share one")
        return gpus

    retries: int = Field(1, ge=0, description="retries of a trial that failed or whose process died")
    checkpoint_gib: float = Field(
        20.0, ge=0, description="disk for checkpoints, shared by concurrent trials; trials over their share have none"
    )
    timeout_seconds: float | None = Field(
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
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field([1, 8, 64], min_length=1, description="images per call")
    uint8: bool = Field(
        False, description="time uint8 images to labels, normalisation included; else normalised float32 to logits"
    )
    scope: Literal["host", "device", "both"] = Field(
        "host",
        description="host: arrays in main memory, copies to and from a GPU included; device: images and logits stay on "
        "the GPU; both: one after the other, the recommendation is for host",
    )
    replicates: Annotated[int, Field(ge=2)] | Literal["auto"] = Field(
        5,
        description="fresh processes per arm; intervals are over replicates; auto: 5, then 8, 13 and 20 until it is "
        "settled which arms are as fast as the fastest",
    )
    rounds: int = Field(2, ge=1, description="interleaved measurements per arm and batch size in a replicate")
    round_seconds: float = Field(0.1, gt=0, description="shortest duration of a measurement")
    threads: int | None = Field(None, ge=1, description="threads of every runtime on CPU; default: the number of cores")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is a GPU")
    batch_size: int | None = Field(None, ge=1, description="batch size that the recommendation targets; default: 64")
    max_accuracy_drop: float = Field(
        0.005, ge=0, lt=1, description="allowed accuracy drop of the recommended arm from PyTorch float32, a fraction"
    )
    latency_ms: float | None = Field(
        None,
        gt=0,
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

    @field_validator("run")
    @classmethod
    def _absolute(cls, run: Path) -> Path:
        return Path(run).expanduser().absolute()


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
        return None if run is None else Path(run).expanduser().absolute()
