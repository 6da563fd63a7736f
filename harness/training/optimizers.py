"""Optimisers."""

import torch
from torch import nn

from harness.config import Trial


def make_optimizer(network: nn.Module, trial: Trial, device: torch.device) -> torch.optim.Optimizer:
    """torch.optim's optimiser over what is to be trained, in its fused form (one kernel instead of many)."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    chosen = trial.optimizer
    if chosen.name == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=chosen.lr,
            momentum=chosen.momentum,
            nesterov=chosen.nesterov,
            weight_decay=chosen.weight_decay,
            fused=True,
        )
        if chosen.momentum:  # zero is the same as none, but for a first step that float16's scaler leaves out
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind: type[torch.optim.Adam] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[chosen.name]
    on_device = device.type == "cuda"  # its step count, which a CUDA graph needs
    return kind(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=True, capturable=on_device)
