"""Four 3x3 convolutions with Mish, batch norm, pooling and dropout 0.1; linear 1024-512-classes with ReLU between.

The published report's model 2 (task 3c): test accuracy 0.7587 on CIFAR-10 after 10 epochs. 2048 inputs to the first
linear layer after four poolings of 32x32 need 512 filters in the fourth block; the report's table puts a ReLU
on the logits, an error that is not reproduced.
"""

from collections.abc import Sequence

from torch import nn

from architectures._blocks import single_convolution_blocks


def build(
    num_classes: int = 10,
    *,
    input_size: int = 32,
    widths: Sequence[int] = (64, 128, 256, 512),
    hidden: Sequence[int] = (1024, 512),
    kernel_size: int = 3,
    activation: str = "mish",
    classifier_activation: str = "relu",
    batch_norm: str = "after",
    dropout: float = 0.1,
) -> nn.Module:
    """[N, 3, input_size, input_size] -> logits [N, num_classes]; `batch_norm`: none, before or after activation.

    Raises ValueError where an option is invalid.
    """
    return single_convolution_blocks(
        num_classes, input_size, widths, hidden, kernel_size, activation, classifier_activation, batch_norm, dropout
    )
