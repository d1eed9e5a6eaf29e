"""Stored form of weights for the CUDA kernels: tiles in the order of tensor-core fragments."""

from __future__ import annotations

import numpy as np

from optimizer.custom_ops.declaration import LAYOUTS
from optimizer.custom_ops.packing import Packed, to_tiles

MMA16, MMA8, SP16 = LAYOUTS["mma16"], LAYOUTS["mma8"], LAYOUTS["sp16"]
#: Values of a tile begin at multiples of this many bytes.
ALIGNMENT = 16


def pack_mma16(weight: np.ndarray) -> Packed:
    """The stored form of ``weight`` [K, N], of 16-bit numbers; gaps between tiles are zeros."""
    tiles = to_tiles(weight, MMA16)
    return _pack(tiles, tiles != 0)


def pack_mma8(weight: np.ndarray) -> Packed:
    """The stored form of ``weight`` [K, N], int8; gaps between tiles are zeros."""
    tiles = to_tiles(weight, MMA8)
    return _pack(tiles, tiles != 0)


def pack_sp16(weight: np.ndarray) -> Packed:
    """The stored form of a 2:4 ``weight`` [K, N]: two values per group of four rows of a column.

    Raises:
        ValueError: A group has more than two weights that are not zero; names the first.
    """
    padded = np.pad(weight, ((0, -weight.shape[0] % 4), (0, 0)))
    counts = (padded != 0).reshape(-1, 4, weight.shape[1]).sum(axis=1)
    if counts.max(initial=0) > 2:
        group, column = (int(v) for v in np.argwhere(counts > 2)[0])
        msg = (
            f"the weight {list(weight.shape)} is not 2:4 sparse along K: column {column} has "
            f"{counts[group, column]} weights that are not zero in rows {4 * group} to "
            f"{4 * group + 3}, at most 2 may be"
        )
        raise ValueError(msg)
    tiles = to_tiles(weight, SP16)
    groups = (tiles != 0).reshape(-1, 4)
    # Where fewer than two are not zero, zeros are stored: the first ones of the group.
    order = np.argsort(~groups, axis=1, kind="stable")[:, :2]
    stored = np.zeros_like(groups)
    np.put_along_axis(stored, order, values=True, axis=1)
    return _pack(tiles, stored.reshape(tiles.shape))


def _pack(tiles: np.ndarray, stored: np.ndarray) -> Packed:
    counts = stored.sum(axis=1)
    unit = ALIGNMENT // tiles.itemsize
    padded = -(-counts // unit) * unit
    offsets = np.concatenate([[0], np.cumsum(padded)]).astype(np.int32)
    values = np.zeros(max(int(offsets[-1]), unit), tiles.dtype)
    places = offsets[:-1, None] + np.cumsum(stored, axis=1) - 1
    values[places[stored]] = tiles[stored]
    bitmap = np.packbits(stored, axis=1, bitorder="little").view(np.int8)
    return Packed(bitmap, values, offsets)
