"""AOTInductor: the code of torch.compile, compiled at export and loaded without compiling."""

import numpy as np
import torch

from export import Artifact
from export.runtimes import Predict, Unavailable
from harness.run import system

FORMAT = "aoti"


def load(artifact: Artifact, device: str, threads: int) -> Predict:
    if device != "cpu":
        raise Unavailable("AOTInductor: the file is compiled for the CPU")
    there, here = artifact.manifest.environment, system.environment()
    if (made := (there["cpu"], there["versions"]["torch"])) != (now := (here.cpu, here.versions["torch"])):
        raise Unavailable(
            f"AOTInductor: the file was compiled for {made}, this machine has {now}; export again on this machine"
        )
    torch.set_num_threads(threads)
    try:
        compiled = torch._inductor.aoti_load_package(str(artifact.path))
    except Exception as error:
        raise Unavailable(f"AOTInductor: {' '.join(str(error).split())[:300]}") from error

    def predict(images: np.ndarray) -> np.ndarray:
        dense = torch.from_numpy(np.ascontiguousarray(images))  # the compiled code ignores strides
        with torch.inference_mode():
            logits: np.ndarray = compiled(dense).numpy()
            return logits

    return predict
