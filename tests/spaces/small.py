"""A search that takes seconds: a narrow baseline on a few digits."""

from tune_spaces import Choice, LogUniform, Space

SPACE = Space(
    trial={
        "architecture": "baseline",
        "options.widths": [8, 16],
        "options.hidden": [16],
        "options.kernel_size": 3,
        "epochs": 2,
        "batch_size": 16,
        "optimizer.name": "adam",
        "optimizer.lr": 5e-3,
    },
    data={"name": "digits", "limit": 40},
    search={"samples": 3, "confirm": 2, "confirm_seeds": 2},
    parameters={
        "optimizer.lr": LogUniform(1e-3, 2e-2),
        "options.activation": Choice(["relu", "mish"]),
    },
)
