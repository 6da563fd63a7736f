"""ResNet-18 with a new head on images enlarged to 112x112; layer4 and the head are trained, the rest is frozen.

The published report's task 4a: test accuracy 0.898 on CIFAR-10 from ImageNet weights (`weights=imagenet`, which
torchvision downloads and checks). Images are enlarged inside the network, on the device, so that only 32x32 images are
stored and copied; set trial.normalization to ImageNet's mean and std.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

# torchvision's ResNet.forward, part by part.
ORDER = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")


class Transfer(nn.Module):
    """`network` on images resized to `resize` pixels, with the named children frozen.

    `frozen_prefix`: paths of the children before the first trained one, whose outputs never change. Raises ValueError
    where a name in `frozen` is unknown or nothing is left to train.
    """

    def __init__(self, network: nn.Module, resize: int, frozen: Sequence[str]):
        super().__init__()
        self.network = network
        self.resize = resize
        children = dict(network.named_children())
        for name in frozen:
            if name not in children:
                raise ValueError(f"frozen={name}: no such layer; choose from {', '.join(children)}")
            children[name].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(f"frozen={list(frozen)}: nothing is left to train; freeze fewer layers")
        self.frozen = tuple(frozen)
        trained = [n for n in ORDER if n not in frozen and any(True for _ in children[n].parameters())]
        before = ORDER[: ORDER.index(trained[0])] if trained else ORDER
        self.frozen_prefix = tuple(f"network.{name}" for name in before if any(part in frozen for part in before))

    def train(self, mode: bool = True) -> "Transfer":
        super().train(mode)
        for name in self.frozen:  # frozen batch norm must keep its statistics, or the features would drift
            self.network.get_submodule(name).eval()
        return self

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images [N, 3, H, W]: the output of the `frozen_prefix` layers."""
        if self.resize:
            size = (self.resize, self.resize)
            images = nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
        for path in self.frozen_prefix:
            images = self.get_submodule(path)(images)
        return images

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [N, num_classes] from the output of `features`."""
        for name in ORDER[len(self.frozen_prefix) :]:
            features = self.network.get_submodule(name)(features)
        return self.network.get_submodule("fc")(features.flatten(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def build(
    num_classes: int = 10,
    *,
    weights: str = "none",
    resize: int = 112,
    frozen: Sequence[str] = ("conv1", "bn1", "layer1", "layer2", "layer3"),
) -> nn.Module:
    """[N, 3, H, W] of any size -> logits [N, num_classes].

    `weights`: none, imagenet, or the path of a ResNet-18 state dict (.safetensors, as trials of this network write, or
    .pt, loaded with weights_only); its head is ignored. `resize`: side in pixels inside the network, 0: no resizing.
    Raises ValueError where the weights cannot be loaded or `frozen` is invalid.
    """
    network = resnet18()
    if weights == "imagenet":
        try:
            state = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"weights=imagenet: cannot be downloaded ({error}); give weights=FILE or none") from error
        network.load_state_dict(state)
    elif weights != "none":
        load_body(network, Path(weights))
    network.fc = nn.Linear(network.fc.in_features, num_classes)
    return Transfer(network, resize, frozen)


def load_body(network: nn.Module, path: Path) -> None:
    """Load a state dict but for the head `fc`. Raises ValueError where it is unreadable or does not fit ResNet-18."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"weights={path}: no such file; choose none, imagenet or the path of a state dict")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
        state = {name.removeprefix("network."): tensor for name, tensor in state.items()}  # saved by a trial
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # each file reader raises its own exceptions
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"weights={path}: cannot be read as a state dict ({reason})") from error
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    for name, tensor in own.items():
        if shapes.get(name) != tensor.shape:
            found = f"of shape {shapes[name]}" if name in shapes else "missing"
            raise ValueError(f"weights={path}: {name} is {found}, ResNet-18 has {tuple(tensor.shape)}")
    for name in state:
        if name not in own and not name.startswith("fc."):  # a deeper ResNet has all of these tensors and more
            raise ValueError(f"weights={path}: {name} is of shape {shapes[name]}, ResNet-18 has no tensor of that name")
    network.load_state_dict({name: state[name] for name in own}, strict=False)
