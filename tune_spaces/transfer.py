"""The report's task 4a: ResNet-18 from ImageNet weights on 112x112, layer4 and the head trained.

Expect the published 0.898 on CIFAR-10's test set (one trial); not measured here yet. torchvision downloads and checks
the weights (45 MB); without a network connection give `trial.options.weights=FILE` or `none`. The forward pass takes
0.97 GFLOP per image; `dry_run=true` estimates 80 minutes a trial on 2 CPU cores.
"""

from tune_spaces import LogUniform, Space

SPACE = Space(
    trial={
        "architecture": "transfer",
        "options.weights": "imagenet",
        "normalization.mean": [0.485, 0.456, 0.406],
        "normalization.std": [0.229, 0.224, 0.225],
        "batch_size": 32,
        "optimizer.name": "adam",
        "optimizer.lr": 5e-4,
        "early_stop": 4,
    },
    search={"samples": 4},
    parameters={
        "optimizer.lr": LogUniform(5e-5, 2e-3),
        "optimizer.weight_decay": LogUniform(1e-6, 1e-3),
    },
)
