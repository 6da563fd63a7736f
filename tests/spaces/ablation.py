"""An ablation that takes seconds: two variants of a narrow baseline, two seeds each."""

from tune_spaces import Space

SPACE = Space(
    trial={
        "architecture": "baseline",
        "options.widths": [8, 16],
        "options.hidden": [16],
        "epochs": 1,
        "batch_size": 16,
        "optimizer.name": "adam",
        "optimizer.lr": 5e-3,
    },
    data={"name": "digits", "limit": 20},
    search={"seeds": 2},
    variants={"relu": {}, "mish": {"options.activation": "mish"}},
)
