"""The report's task 4a: ResNet-18 from ImageNet weights on 112x112, layer4 and the head trained.

Expect what was published, 0.898 on CIFAR-10's test set in one run; not measured here yet. The weights (45 MB) are
downloaded and checked by torchvision; without a network give `trial.options.weights=FILE` or `none`. A trial is
0.97 GFLOP an image forward: `dry_run=true` estimates 80 minutes on 2 CPU cores.
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
