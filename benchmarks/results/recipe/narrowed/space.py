"""The second search of docs/published.md, "The best recipe": narrowed around what the first found."""

from tune_spaces import Choice, LogUniform, Space, Uniform

SPACE = Space(
    trial={
        "architecture": "final",
        "options.dropout": 0.15,
        "optimizer.name": "adam",
        "optimizer.lr": 6e-4,
        "optimizer.weight_decay": 1e-4,
        "schedule.name": "linear",
        "label_smoothing": 0.1,
        "augmentation.flip": True,
        "augmentation.crop_padding": 2,
    },
    search={
        "samples": 4,
        "algorithm": "optuna",
        "scheduler": "asha",
        "asha.grace_epochs": 5,
        "confirm": 1,
        "confirm_seeds": 4,
    },
    parameters={
        "optimizer.lr": LogUniform(4e-4, 1.5e-3),
        "optimizer.weight_decay": LogUniform(3e-5, 5e-4),
        "options.dropout": Uniform(0.0, 0.25),
        "augmentation.crop_padding": Choice([1, 2, 3]),
    },
)
