"""A demo of minutes on a laptop without any download: scikit-learn's digits, a narrow `final`, four samples.

Expect about 0.98 on the 160 test images and two to three minutes on 2 CPU cores. It exists to show every
stage of the harness, not to study the digits.
"""

from tune_spaces import Choice, LogUniform, Space

SPACE = Space(
    trial={
        "architecture": "final",
        "options.widths": [[8, 16], [32, 32], [64, 64]],
        "options.hidden": [128],
        "options.activation": "mish",
        "epochs": 5,
        "batch_size": 32,
        "optimizer.name": "adam",
        "optimizer.lr": 2e-3,
        "keep": "best",
    },
    data={"name": "digits"},
    search={"samples": 4, "confirm": 2, "confirm_seeds": 2},
    parameters={
        "optimizer.lr": LogUniform(5e-4, 1e-2),
        "optimizer.weight_decay": LogUniform(1e-6, 1e-3),
        "options.activation": Choice(["mish", "relu"]),
    },
)
