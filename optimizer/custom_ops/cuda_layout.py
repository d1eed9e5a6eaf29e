"""Stored form of weights for the CUDA kernels: tiles in the order of tensor-core fragments."""

from __future__ import annotations

import numpy as np

from optimizer.custom_ops.declaration import Layout
from optimizer.custom_ops.packing import Packed, to_tiles

#: Lane (g, c), fragment (k / 16, n / 16), then the lane's 8 weights of mma.m16n8k16's operand A:
#: k = 8 u + 2 c + e, n = 8 v + g within the fragment.
MMA16 = Layout("mma16", (8, 4, 4, 4, 2, 2, 2), (2, 4, 1, 6, 3, 5, 0))
#: Values of a tile begin at multiples of this many: 16 bytes.
ALIGNMENT = 8


def pack_mma16(weight: np.ndarray) -> Packed:
    """The stored form of ``weight`` [K, N], of 16-bit numbers; gaps between tiles are zeros."""
    tiles = to_tiles(weight, MMA16)
    stored = tiles != 0
    counts = stored.sum(axis=1)
    padded = -(-counts // ALIGNMENT) * ALIGNMENT
    offsets = np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)
    values = np.zeros(max(int(offsets[-1]), ALIGNMENT), weight.dtype)
    places = offsets[:-1, None] + np.cumsum(stored, axis=1) - 1
    values[places[stored]] = tiles[stored]
    bitmap = np.packbits(stored, axis=1, bitorder="little").view(np.int8)
    return Packed(bitmap, values, offsets)
