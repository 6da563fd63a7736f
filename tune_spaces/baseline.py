"""The report's baseline as published; `search.samples=8` searches learning rate, batch size, momentum and decay.

Expect 0.71 to 0.72 on CIFAR-10's test set within 10 epochs, about 7 minutes a trial on 2 CPU cores.
"""

from tune_spaces import Choice, LogUniform, Space

SPACE = Space(
    trial={
        "architecture": "baseline",
        "optimizer.name": "sgd",
        "optimizer.lr": 5e-2,
        "early_stop": 4,
    },
    search={"samples": 1},
    parameters={
        "optimizer.lr": LogUniform(5e-3, 1e-1),
        "optimizer.momentum": Choice([0.0, 0.9]),
        "optimizer.weight_decay": LogUniform(1e-6, 1e-3),
        "batch_size": Choice([32, 64, 128]),
    },
)
