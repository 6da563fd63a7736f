"""The report's model 1: a search over kernel size, dropout, position of batch norm and learning rate.

Expect about 0.75 on CIFAR-10's test set from the published values (`search.samples=1`); `dry_run=true` estimates 6
minutes a trial on 2 CPU cores.
"""

from tune_spaces import Choice, LogUniform, Space, Uniform

SPACE = Space(
    trial={
        "architecture": "model1",
        "options.kernel_size": 3,
        "options.batch_norm": "after",
        "options.dropout": 0.1,
        "optimizer.name": "sgd",
        "optimizer.lr": 5e-2,
        "early_stop": 4,
    },
    search={"samples": 8},
    parameters={
        "optimizer.lr": LogUniform(5e-3, 2e-1),
        "options.kernel_size": Choice([3, 5]),
        "options.batch_norm": Choice(["before", "after"]),
        "options.dropout": Uniform(0.0, 0.3),
    },
)
