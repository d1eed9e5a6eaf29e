"""Handwritten digits on a larger canvas: data of the small vision models that ship.

The 8 x 8 images of scikit-learn's digits (BSD licence) are enlarged to 20 x 20 to 28 x 28 and put
somewhere on 32 x 32 pixels. What a test needs is kept as 8 x 8 images beside the models, so that
nothing has to be installed for it; the numbers below are drawn from a seed and are always the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

HOME = Path(__file__).resolve().parent / "models" / "digits-vit"
CANVAS, PATCH = 32, 4
SIZES = (20, 24, 28)


def enlarged(image: np.ndarray, size: int) -> np.ndarray:
    """[size, size] of an [8, 8] image, linear between pixels."""
    at = np.linspace(0, len(image) - 1, size)
    low = np.minimum(at.astype(int), len(image) - 2)
    part = at - low
    rows = image[low] * (1 - part[:, None]) + image[low + 1] * part[:, None]
    return np.asarray(rows[:, low] * (1 - part) + rows[:, low + 1] * part)


def placed(images: np.ndarray, seed: int) -> np.ndarray:
    """float32 [n, 1, 32, 32] from 0 to 1, of images [n, 8, 8] from 0 to 16."""
    rng = np.random.default_rng(seed)
    result = np.zeros((len(images), 1, CANVAS, CANVAS), np.float32)
    for canvas, image in zip(result, images, strict=True):
        size = int(rng.choice(SIZES))
        top, left = rng.integers(0, CANVAS - size + 1, 2)
        canvas[0, top : top + size, left : left + size] = enlarged(image / 16, size)
    return result


def load(part: str, copies: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Images [copies * n, 1, 32, 32] and labels of the "test" or "held-out" part.

    Each image is placed ``copies`` times, differently.
    """
    found = np.load(HOME / "digits.npz")
    images, labels = found[f"{part}_images"], found[f"{part}_labels"].astype(np.int64)
    seeds = range(100, 100 + copies)
    return np.concatenate([placed(images, seed) for seed in seeds]), np.tile(labels, copies)
