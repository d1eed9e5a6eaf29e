"""Captions of handwritten digits: data of the small image-text model that ships.

A caption says which digit an image shows, and four things that are measured on the image: slant,
thickness of the stroke and where the ink is, each in one of three classes with bounds that split
the training images into thirds. That makes 810 different captions of ten words each.
"""

from __future__ import annotations

import json
from pathlib import Path

import digits
import numpy as np

HOME = Path(__file__).resolve().parent / "models" / "digits-clip"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Words of each class, by what is measured.
CLASSES = (
    ("slanted left", "not slanted", "slanted right"),
    ("thin", "medium", "thick"),
    ("top", "middle", "bottom"),
    ("left", "centre", "right"),
)
#: Position = token id. "end" has the largest, as in CLIP.
WORDS = (
    "begin", "the", "digit", "slanted", "not", "at", "left", "right", "centre", "top", "middle",
    "bottom", "thin", "medium", "thick", *NUMBERS, "end",
)  # fmt: skip
LENGTH = 12


def measured(images: np.ndarray) -> np.ndarray:
    """Slant, thickness, row and column of the centre, [n, 4], of images [n, 1, 32, 32].

    Slant is the shear that makes ink of rows and columns uncorrelated; thickness is ink by the
    square root of its determinant of second moments, which is the same at any size.
    """
    ink = images[:, 0].astype(np.float64)
    total = ink.sum(axis=(1, 2))
    at = np.arange(digits.CANVAS)
    row, column = (ink.sum(axis=2) @ at) / total, (ink.sum(axis=1) @ at) / total
    y, x = at[None, :, None] - row[:, None, None], at[None, None, :] - column[:, None, None]
    xx, yy, xy = ((ink * m).sum(axis=(1, 2)) / total for m in (x * x, y * y, x * y))
    return np.stack([-xy / yy, total / np.sqrt(xx * yy - xy * xy), row, column], axis=1)


def bounds_of(images: np.ndarray) -> np.ndarray:
    """Bounds [4, 2] between the classes that split ``images`` into thirds."""
    return np.quantile(measured(images), (1 / 3, 2 / 3), axis=0).T


def captions(images: np.ndarray, labels: np.ndarray, bounds: np.ndarray) -> list[str]:
    """One text per image, like "the digit seven, slanted left, thick, at the top right"."""
    found = measured(images)
    kinds = np.stack([np.searchsorted(b, c) for b, c in zip(bounds, found.T, strict=True)], axis=1)
    texts = []
    for label, kind in zip(labels, kinds, strict=True):
        slant, stroke, row, column = (c[k] for c, k in zip(CLASSES, kind, strict=True))
        texts.append(f"the digit {NUMBERS[label]}, {slant}, {stroke}, at the {row} {column}")
    return texts


def tokens(texts: list[str]) -> np.ndarray:
    """int64 [n, 12]: token ids of captions, between begin and end."""
    ids = {word: position for position, word in enumerate(WORDS)}
    rows = [["begin", *text.replace(",", "").split(), "end"] for text in texts]
    return np.array([[ids[word] for word in row] for row in rows], np.int64)


def feed(texts: list[str]) -> dict[str, np.ndarray]:
    """Inputs of the text tower."""
    ids = tokens(texts)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def load(part: str, copies: int = 1) -> tuple[np.ndarray, list[str]]:
    """Images [copies * n, 1, 32, 32] and captions of the "test" or "held-out" part."""
    images, labels = digits.load(part, copies)
    bounds = np.array(json.loads((HOME / "bounds.json").read_text())["bounds"])
    return images, captions(images, labels, bounds)


def recalls(images: np.ndarray, texts: np.ndarray, names: list[str]) -> dict[str, float]:
    """Share of queries that find their like among the first 1 and 5, in both directions.

    Candidates of an image are all different captions of ``names``, and those of a caption are all
    images; of equal captions, any of their images is right.

    Args:
        images: Embeddings [n, D].
        texts: Embeddings [n, D] of the captions.
        names: The captions.
    """
    different, first, like = np.unique(names, return_index=True, return_inverse=True)
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    other = texts[first] / np.linalg.norm(texts[first], axis=1, keepdims=True)
    scores = unit @ other.T
    right = like[:, None] == np.arange(len(different))
    result = {}
    for name, score, hit in (
        ("image_to_text", scores, right),
        ("text_to_image", scores.T, right.T),
    ):
        best = np.argsort(-score, axis=1, kind="stable")[:, :5]
        hits = np.take_along_axis(hit, best, axis=1)
        for k in (1, 5):
            result[f"{name}_{k}"] = float(hits[:, :k].any(axis=1).mean())
    return result
