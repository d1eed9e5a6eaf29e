"""Random weights for the CUDA layouts."""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def random_weight(
    shape: tuple[int, int], density: float | str, layout: str, dtype: str, seed: int = 1
) -> np.ndarray:
    """Random numbers (int8 codes for int8 layouts); density "2:4" keeps two random ones of four."""
    rng = np.random.default_rng(seed)
    k, n = shape
    if layout in ("mma8", "sp8"):
        weight = rng.integers(1, 128, shape) * rng.choice([-1, 1], shape)
        weight = weight.astype(np.int8)
    else:
        weight = (rng.standard_normal(shape) / max(1, k) ** 0.5).astype(DTYPES[dtype])
        weight[weight == 0] = 1
    if density == "2:4":
        order = np.argsort(rng.random((-(-k // 4), 4, n)), axis=1)
        weight[(order >= 2).reshape(-1, n)[:k]] = 0
    else:
        weight[rng.random(shape) >= float(density)] = 0
    return weight
