"""Three blocks of two 3x3 convolutions with Mish, then linear 1024-1024-classes: 6,382,090 parameters.

The published report's final model (task 3e): at least 0.80 on CIFAR-10's test set within 10 epochs. Its table's
"BatchNorm2d 128" in the third block follows 256 filters, and its "linear 2048" input is 256*4*4 = 4096 features.
"""

from collections.abc import Sequence

from torch import nn

from architectures._blocks import check_sizes, classifier, convolution, pooled_size


def build(
    num_classes: int = 10,
    *,
    input_size: int = 32,
    widths: Sequence[Sequence[int]] = ((32, 64), (128, 128), (256, 256)),
    hidden: Sequence[int] = (1024, 1024),
    kernel_size: int = 3,
    activation: str = "mish",
    batch_norm: str = "first",
    dropout: float = 0.0,
) -> nn.Module:
    """[N, 3, input_size, input_size] -> logits [N, num_classes].

    `widths`: filters of each convolution, block by block. `batch_norm`: none, or before the activation of the first
    or of all convolutions of a block. `dropout` follows each pooling. Raises ValueError where an option is invalid.
    """
    if batch_norm not in ("none", "first", "all"):
        raise ValueError(f"batch_norm={batch_norm}: choose none, first or all (convolutions of a block)")
    if not isinstance(widths, list | tuple) or not all(isinstance(block, list | tuple) for block in widths):
        raise ValueError(f"widths={widths}: give a list of lists, one per block")
    check_sizes([width for block in widths for width in block], hidden, kernel_size, input_size)
    layers: list[nn.Module] = []
    inputs = 3
    for block in widths:
        for position, width in enumerate(block):
            normalised = batch_norm == "all" or (batch_norm == "first" and position == 0)
            layers += convolution(inputs, width, kernel_size, activation, "before" if normalised else "none")
            inputs = width
        layers.append(nn.MaxPool2d(2))
        if dropout:
            layers.append(nn.Dropout(dropout))
    flattened = inputs * pooled_size(input_size, len(widths)) ** 2
    return nn.Sequential(*layers, *classifier(flattened, hidden, num_classes, activation))
