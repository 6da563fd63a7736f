"""The report's model 2: a search over activation, dropout and the optimiser around its published values.

Expect about 0.76 on CIFAR-10's test set from the published values (`search.samples=1`); `dry_run=true` estimates
28 minutes a trial on 2 CPU cores.
"""

from tune_spaces import Choice, LogUniform, Space, Uniform

SPACE = Space(
    trial={
        "architecture": "model2",
        "options.activation": "mish",
        "options.dropout": 0.1,
        "optimizer.name": "sgd",
        "optimizer.lr": 5e-2,
        "early_stop": 4,
    },
    search={"samples": 8},
    parameters={
        "optimizer.lr": LogUniform(5e-3, 2e-1),
        "optimizer.weight_decay": LogUniform(1e-6, 1e-3),
        "options.activation": Choice(["mish", "relu", "silu"]),
        "options.dropout": Uniform(0.0, 0.3),
    },
)
