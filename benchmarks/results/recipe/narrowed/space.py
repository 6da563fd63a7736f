"""The second search of docs/published.md, "The best recipe": narrowed around what the first found, without a rise."""

from tune_spaces import Choice, LogUniform, Space, Uniform, recipe

SPACE = Space(
    trial={**recipe.SPACE.trial, "optimizer.lr": 6e-4, "schedule.warmup_epochs": 0.0},
    search=recipe.SPACE.search,
    parameters={
        "optimizer.lr": LogUniform(4e-4, 1.5e-3),
        "optimizer.weight_decay": LogUniform(3e-5, 5e-4),
        "options.dropout": Uniform(0.0, 0.25),
        "augmentation.crop_padding": Choice([1, 2, 3]),
    },
)
