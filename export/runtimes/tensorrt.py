"""TensorRT by way of onnxruntime's provider, where it is installed; engines are kept by the file's digest."""

from export import Artifact
from export.runtimes import Served, Unavailable
from export.runtimes.onnxruntime import opened, served

FORMAT = "onnx"
PROVIDER = "TensorrtExecutionProvider"


def load(artifact: Artifact, device: str, threads: int) -> Served:
    if device != "cuda":
        raise Unavailable("TensorRT needs a CUDA device")
    from harness.run.cache import cache_folder

    # Networks that differ in weights alone have graphs of one name: without a prefix one would get the other's engine.
    kept = cache_folder("tensorrt")
    session = opened(
        artifact,
        threads,
        PROVIDER,
        {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(kept),
            "trt_engine_cache_prefix": artifact.entry.sha256[:16],
            "trt_fp16_enable": "0",
        },
    )
    return served(session)
