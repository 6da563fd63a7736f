"""The 1,797 grey 8x8 digits inside scikit-learn, enlarged to 32x32x3: needs no download.

It has no test split of its own; the fraction `data.validation` of each class's remaining images becomes one.
"""

import importlib.metadata

import numpy as np

from harness.config import Data
from harness.data.dataset import Decoded, OnProgress


def identity(data: Data) -> str:
    return f"scikit-learn {importlib.metadata.version('scikit-learn')} digits"


def decode(data: Data, progress: OnProgress) -> Decoded:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    side = data.size or 32
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    images = np.stack(
        [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BILINEAR)) for one in grey]
    )
    progress(len(images), len(images))
    return Decoded(
        classes=tuple(str(name) for name in digits.target_names),
        train=(np.repeat(images[..., None], 3, axis=3), digits.target.astype(np.int64)),
        test=None,
    )
