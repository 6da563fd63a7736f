"""Building blocks that the convolutional networks of this folder share."""

from collections.abc import Sequence

from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "mish": nn.Mish, "silu": nn.SiLU, "gelu": nn.GELU}


def activation(name: str) -> nn.Module:
    """The activation of that name. Raises ValueError, with the known names, where it is unknown."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name}: unknown; choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def check_sizes(widths: Sequence[int], hidden: Sequence[int], kernel_size: int, input_size: int) -> None:
    """Raises ValueError unless the lists hold integers above 0, `widths` at least one, and the kernel fits an image."""
    for name, values in (("widths", widths), ("hidden", hidden)):
        if not isinstance(values, list | tuple) or any(type(one) is not int or one < 1 for one in values):
            raise ValueError(f"{name}={values}: give a list of integers above 0")
    if not widths:
        raise ValueError("widths=[]: give the filters of at least one convolution")
    if kernel_size > input_size:
        raise ValueError(f"kernel_size={kernel_size}: larger than the image of {input_size} pixels")


def same_padding(kernel_size: int) -> int:
    """Padding that preserves height and width at stride 1: (K - 1) / 2. Raises ValueError unless K is odd."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size}: must be odd and positive to keep height and width")
    return (kernel_size - 1) // 2


def convolution(inputs: int, outputs: int, kernel_size: int, activation_name: str, batch_norm: str) -> list[nn.Module]:
    """Convolution with `same` padding and activation; batch norm `none`, `before` or `after` it, else ValueError."""
    layers = [nn.Conv2d(inputs, outputs, kernel_size, padding=same_padding(kernel_size)), activation(activation_name)]
    if batch_norm not in ("none", "before", "after"):
        raise ValueError(f"batch_norm={batch_norm}: choose none, before or after (the activation)")
    if batch_norm != "none":
        layers.insert(1 if batch_norm == "before" else 2, nn.BatchNorm2d(outputs))
    return layers


def pooled_size(input_size: int, pools: int) -> int:
    """Side of the image in pixels after `pools` 2x2 poolings. Raises ValueError where none remains."""
    size = input_size // 2**pools
    if size < 1:
        raise ValueError(f"input_size={input_size}: too small for {pools} poolings; needs at least {2**pools}")
    return size


def classifier(inputs: int, hidden: Sequence[int], num_classes: int, activation_name: str) -> list[nn.Module]:
    """Flatten, then linear layers inputs-hidden...-num_classes with activations between them, none on the logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), activation(activation_name)]
        inputs = width
    return [*layers, nn.Linear(inputs, num_classes)]


def single_convolution_blocks(
    num_classes: int,
    input_size: int,
    widths: Sequence[int],
    hidden: Sequence[int],
    kernel_size: int,
    activation_name: str,
    classifier_activation_name: str,
    batch_norm: str,
    dropout: float,
) -> nn.Sequential:
    """[convolution - 2x2 max pooling - dropout] once per width, then the classifier."""
    check_sizes(widths, hidden, kernel_size, input_size)
    layers: list[nn.Module] = []
    inputs = 3
    for width in widths:
        layers += [*convolution(inputs, width, kernel_size, activation_name, batch_norm), nn.MaxPool2d(2)]
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    flattened = inputs * pooled_size(input_size, len(widths)) ** 2
    return nn.Sequential(*layers, *classifier(flattened, hidden, num_classes, classifier_activation_name))
