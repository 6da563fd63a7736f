"""torch.compile with its default mode, one static graph per batch size; a graph break is an error."""

import logging

import torch

from export import Artifact
from export.runtimes import Predict, Unavailable
from export.runtimes.torch_eager import as_predict, network
from harness.step import cpp_compiler

FORMAT = "torch"


def load(artifact: Artifact, device: str, threads: int) -> Predict:
    if device == "cpu" and not cpp_compiler():
        raise Unavailable("torch.compile needs a C++ compiler on CPU; install g++")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of the GPU that is not there
    return as_predict(torch.compile(network(artifact, device, threads), dynamic=False, fullgraph=True), device)
