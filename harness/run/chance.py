"""Chance level: when a network has learned nothing."""

import math
from statistics import NormalDist


def is_chance(accuracy: float, chance: float, images: int, looks: int = 1) -> bool:
    """Whether an accuracy over so many images, the best of so many validations, is not above that of always answering
    the most frequent class: from 100 images on, by a one-sided test at 5 %, corrected for their number (Bonferroni)."""
    limit = NormalDist().inv_cdf(1 - 0.05 / max(1, looks))
    margin = limit * math.sqrt(chance * (1 - chance) / images) if images >= 100 else 0.0
    return accuracy <= chance + margin + 1e-9
