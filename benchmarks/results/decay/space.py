"""The report's final model with and without weight decay, each trained for five whole epochs: docs/published.md."""

from tune_spaces import Claim, Space, published

PLAIN = published.SPACE.variants["final"]
DECAY = published.SPACE.variants["final_weight_decay"]
SPACE = Space(
    trial={**published.SPACE.trial, "epochs": 5, "early_stop": None},
    search={"seeds": 5, "seed": 100},
    variants={"final": PLAIN, "final_weight_decay": DECAY},
    claims=[Claim("weight decay 5e-4 reduces overfitting (final, five epochs)", "final_weight_decay", "final", "gap")],
)
