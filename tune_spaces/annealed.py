"""The unsettled claims of the published report again, with a learning rate that falls to zero, without early stop.

Under the published recipe (constant rate, early stop) seeds of one variant differ by about a point, mostly by when they
stop; at equal epochs and with an annealed rate by about 0.15 points, so that far fewer seeds settle the same question.

The plan of analysis, fixed before any trial ran: `search.seeds=auto`, that is looks after 3, 5, 8, 13 and 20 seeds, of
which each may spend a fifth of 0.05; t-tests under the comparison model of harness/stats/comparison.py, with Holm's
correction over the open claims. A claim is settled by a difference, or by showing that there is none as large as half a
point of test accuracy (two points of the gap between training and test accuracy). All variants keep their last weights;
`model1` and its variants train for eight epochs, `final` and its variant for five. Expect 140 s a trial of `model1` and
ten minutes a trial of `final`, two trials at a time on 2 CPU cores (bfloat16, `trial.compile=kernels`).
"""

from tune_spaces import Claim, Space, published

MODEL1 = published.MODEL1 | {"epochs": 8}
FINAL = published.FINAL | {"epochs": 5}

SPACE = Space(
    trial={**published.SPACE.trial, "early_stop": None, "schedule.name": "linear"},
    search={"seeds": "auto", "seed": 1000},
    variants={
        "model1": MODEL1,
        "model1_5x5": MODEL1 | {"options.kernel_size": 5},
        "model1_adam": MODEL1 | {"optimizer.name": "adam", "optimizer.lr": 5e-3},
        "model1_no_batchnorm": MODEL1 | {"options.batch_norm": "none"},
        "model1_no_dropout": MODEL1 | {"options.dropout": 0.0},
        "final": FINAL,
        "final_weight_decay": FINAL | {"optimizer.weight_decay": 5e-4},
    },
    claims=[
        Claim("batch norm helps (model1)", "model1", "model1_no_batchnorm"),
        Claim("dropout 0.1 after convolutions barely helps (model1)", "model1", "model1_no_dropout", margin=0.005),
        Claim("SGD at 5e-2 instead of Adam at 5e-3 (model1)", "model1", "model1_adam"),
        Claim("3x3 instead of 5x5 kernels (model1)", "model1", "model1_5x5"),
        Claim("weight decay 5e-4 reduces overfitting (final)", "final_weight_decay", "final", metric="gap"),
    ],
)
