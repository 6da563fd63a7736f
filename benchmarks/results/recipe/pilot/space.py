"""Four ways for the rate to move, three epochs each: docs/published.md, "The best recipe"."""

from tune_spaces import Space, recipe

ONE_CYCLE = {"schedule.name": "one_cycle"}
SPACE = Space(
    trial={**recipe.SPACE.trial, "options.dropout": 0.1, "optimizer.lr": 6e-4, "schedule.warmup_epochs": 0.0}
    | {"epochs": 3},
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
