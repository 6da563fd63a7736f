"""Four ways for the rate to move, three epochs each: docs/published.md, "The best recipe"."""

from tune_spaces import Space

ONE_CYCLE = {"schedule.name": "one_cycle"}
SPACE = Space(
    trial={
        "architecture": "final",
        "options.dropout": 0.1,
        "optimizer.name": "adam",
        "optimizer.lr": 6e-4,
        "optimizer.weight_decay": 1e-4,
        "schedule.name": "linear",
        "label_smoothing": 0.1,
        "augmentation.flip": True,
        "augmentation.crop_padding": 2,
        "epochs": 3,
    },
    search={"seeds": 1},
    variants={
        "sgd": ONE_CYCLE
        | {"optimizer.name": "sgd", "optimizer.lr": 0.04, "optimizer.weight_decay": 5e-4}
        | {"optimizer.momentum": 0.9, "optimizer.nesterov": True},
        "adam": {},
        "warm": {"optimizer.lr": 1e-3, "schedule.warmup_epochs": 0.6},
        "adamw": ONE_CYCLE | {"optimizer.name": "adamw", "optimizer.lr": 1.2e-3, "optimizer.weight_decay": 0.03},
    },
)
