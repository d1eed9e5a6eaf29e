"""Packs a dense weight as plugins/sparse_matmul/sparse_matmul.h describes, with numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TILE = 64
#: Numbers of the enum Layout.
N64K1, N16K4 = 0, 1


def tiles(weight: NDArray, layout: int) -> NDArray:
    """The tiles [T, 4096] of `weight` [K, N], padded with zeros, each in order of position."""
    rows, columns = (-(-size // TILE) for size in weight.shape)
    padded = np.zeros((rows * TILE, columns * TILE), weight.dtype)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    cut = padded.reshape(rows, TILE, columns, TILE).transpose(2, 0, 1, 3).reshape(-1, TILE, TILE)
    if layout == N16K4:
        cut = cut.reshape(-1, 16, 4, 4, 16).transpose(0, 1, 3, 4, 2)
    return cut.reshape(-1, TILE * TILE)


def pack(weight: NDArray, layout: int) -> tuple[NDArray, NDArray, NDArray]:
    """(bitmap uint8 [T, 512], offsets int32 [T + 1], values [V]) of `weight` [K, N]."""
    cut = tiles(weight, layout)
    stored = cut != 0
    counts = stored.sum(1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return (
        np.packbits(stored, axis=1, bitorder="little"),
        offsets,
        np.ascontiguousarray(cut[stored]),
    )
