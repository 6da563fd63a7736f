"""What a network consists of: layers, output shapes, parameters, multiply-adds."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Layer:
    """One leaf module in the order of computation; `macs` are multiply-adds of convolutions and matrix products."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int


@dataclass(frozen=True)
class Summary:
    layers: tuple[Layer, ...]
    parameters: int
    trainable_parameters: int
    macs: int


def summarize(network: nn.Module, input_size: int) -> Summary:
    """Run one image of [3, input_size, input_size] through the network (in eval mode) and count.

    Multiply-adds are half of the floating-point operations that PyTorch's own FlopCounterMode counts: those of
    convolutions and matrix products, for one image; element-wise work and biases are not in them.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    leaves = {name: module for name, module in network.named_modules() if not list(module.children())}

    def remember(name: str):
        def hook(_module, _inputs, output):
            shapes[name] = tuple(output.shape)

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in leaves.items()]
    was_training = network.training
    device = next(network.parameters()).device
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.eval()(torch.zeros(1, 3, input_size, input_size, device=device))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()

    counts = counter.get_flop_counts()
    root = type(network).__name__
    layers = tuple(
        Layer(
            name=name,
            kind=type(leaves[name]).__name__,
            output_shape=shape,
            parameters=sum(p.numel() for p in leaves[name].parameters()),
            macs=sum(counts.get(f"{root}.{name}", {}).values()) // 2,
        )
        for name, shape in shapes.items()
    )
    return Summary(
        layers=layers,
        parameters=sum(p.numel() for p in network.parameters()),
        trainable_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        macs=counter.get_total_flops() // 2,
    )
