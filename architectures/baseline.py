"""Three 5x5 convolutions with pooling, then 64 hidden units: 390,410 parameters at 32x32 and 10 classes.

The published report's first network (tasks 1g and 2): test accuracy 0.7184 on CIFAR-10 after 8 epochs of SGD.
"""

from collections.abc import Sequence

from torch import nn

from architectures._blocks import single_convolution_blocks


def build(
    num_classes: int = 10,
    *,
    input_size: int = 32,
    widths: Sequence[int] = (32, 64, 128),
    hidden: Sequence[int] = (64,),
    kernel_size: int = 5,
    activation: str = "relu",
    batch_norm: str = "none",
    dropout: float = 0.0,
) -> nn.Module:
    """[N, 3, input_size, input_size] -> logits [N, num_classes]; `batch_norm`: none, before or after activation.

    Raises ValueError where an option is invalid.
    """
    return single_convolution_blocks(
        num_classes, input_size, widths, hidden, kernel_size, activation, activation, batch_norm, dropout
    )
