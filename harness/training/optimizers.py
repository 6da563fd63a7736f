"""Optimisers."""

import torch
from torch import nn

from harness.config import Trial


def takes_fused(network: nn.Module) -> bool:
    """Whether fused optimisers take the network's parameters: they refuse complex ones."""
    return all(p.is_floating_point() for p in network.parameters() if p.requires_grad)


def make_optimizer(network: nn.Module, trial: Trial, device: torch.device) -> torch.optim.Optimizer:
    """The torch.optim optimiser over the trainable parameters, fused (one kernel instead of many) where it can be."""
    fused = takes_fused(network)
    parameters = [p for p in network.parameters() if p.requires_grad]
    chosen = trial.optimizer
    if chosen.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=chosen.lr,
            momentum=chosen.momentum,
            nesterov=chosen.nesterov,
            weight_decay=chosen.weight_decay,
            fused=fused,
        )
        if chosen.momentum:  # zero equals none, unless float16's scaler skips the first step
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[chosen.name]
    on_device = device.type == "cuda"  # keeps the step count on the GPU, as CUDA graphs require
    return kind(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=fused, capturable=on_device)
