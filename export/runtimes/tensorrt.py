"""TensorRT through onnxruntime's provider, where installed; engines are cached under the file's digest."""

from export import Artifact
from export.runtimes import Served, Unavailable
from export.runtimes.onnxruntime import opened, served

FORMAT = "onnx"
PROVIDER = "TensorrtExecutionProvider"


def load(artifact: Artifact, device: str, threads: int) -> Served:
    if device != "cuda":
        raise Unavailable("TensorRT needs a CUDA device")
    from harness.run.cache import cache_folder

    # Graphs that differ only in weights have the same name: without a prefix one would get the other's engine.
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
