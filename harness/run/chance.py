"""Chance level: when a network has learned nothing."""

import math


def is_chance(accuracy: float, chance: float, images: int) -> bool:
    """Whether an accuracy over so many images is not above that of always answering the most frequent class: from 100
    images on, by a one-sided test at 5 %."""
    margin = 1.645 * math.sqrt(chance * (1 - chance) / images) if images >= 100 else 0.0
    return accuracy <= chance + margin + 1e-9
