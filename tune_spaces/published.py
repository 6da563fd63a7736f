"""Every row of the published report as a variant, each trained with three seeds.

Published test accuracies on CIFAR-10: baseline 0.7184, model1 0.755 (5x5 kernels 0.748, Adam 0.7446), model2 0.7587,
final at least 0.80, transfer 0.898. All stop early as in the report: when the oldest of the last four validation losses
is the lowest of them. `final_flip` instead keeps the weights of its best validation over the full 10 epochs. Without
`transfer`, five seeds of `baseline`, `model1` and `model2` and three of `final` took two hours on 2 CPU cores
(bfloat16, `trial.compile=kernels`); for a subset: `search.variants=[baseline,model1] search.seeds=1`. Measured results:
docs/published.md.
"""

from tune_spaces import Claim, Space, transfer

MODEL1 = {"architecture": "model1"}
FINAL = {"architecture": "final", "optimizer.name": "adam", "optimizer.lr": 5e-4}

SPACE = Space(
    trial={
        "architecture": "baseline",
        "epochs": 10,
        "batch_size": 64,
        "optimizer.name": "sgd",
        "optimizer.lr": 5e-2,
        "early_stop": 4,
        "keep": "last",
    },
    search={"seeds": 3},
    variants={
        "baseline": {},
        "model1": MODEL1,
        "model1_5x5": MODEL1 | {"options.kernel_size": 5},
        "model1_adam": MODEL1 | {"optimizer.name": "adam", "optimizer.lr": 5e-3},
        "model1_no_batchnorm": MODEL1 | {"options.batch_norm": "none"},
        "model1_no_dropout": MODEL1 | {"options.dropout": 0.0},
        "model2": {"architecture": "model2"},
        "final": FINAL,
        "final_relu": FINAL | {"options.activation": "relu"},
        "final_weight_decay": FINAL | {"optimizer.weight_decay": 5e-4},
        "final_flip": FINAL | {"augmentation.flip": True, "early_stop": None, "keep": "best"},
        "transfer": transfer.SPACE.trial,
    },
    claims=[
        Claim("batch norm helps (model1)", "model1", "model1_no_batchnorm"),
        Claim("dropout 0.1 after convolutions barely helps (model1)", "model1", "model1_no_dropout", margin=0.005),
        Claim("SGD at 5e-2 instead of Adam at 5e-3 (model1)", "model1", "model1_adam"),
        Claim("3x3 instead of 5x5 kernels (model1)", "model1", "model1_5x5"),
        Claim("Mish instead of ReLU (final)", "final", "final_relu"),
        Claim("model2 as a whole instead of model1 as a whole", "model2", "model1"),
        Claim("weight decay 5e-4 reduces overfitting (final)", "final_weight_decay", "final", metric="gap"),
    ],
    published={
        "baseline": 0.7184,
        "model1": 0.755,
        "model1_5x5": 0.748,
        "model1_adam": 0.7446,
        "model2": 0.7587,
        "final": 0.80,
        "final_flip": 0.80,
        "transfer": 0.898,
    },
)
