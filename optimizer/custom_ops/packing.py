"""Weights to the stored form of ``SparseMatMul`` and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizer.custom_ops.declaration import BITMAP_BYTES, LAYOUTS, TILE, Layout


@dataclass(frozen=True)
class Packed:
    """A weight as it is stored.

    Attributes:
        bitmap: int8 [T, 512]; bit b of byte i says whether position 8 i + b of the tile is stored.
        values: [V], at least one.
        offsets: int32 [T + 1]; where each tile's values begin.
    """

    bitmap: np.ndarray
    values: np.ndarray
    offsets: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of all three arrays."""
        return int(self.bitmap.nbytes + self.values.nbytes + self.offsets.nbytes)


def packed_bytes(k: int, n: int, stored: int, itemsize: int) -> int:
    """Bytes of a weight [k, n] with that many stored values."""
    tiles = -(-k // TILE) * -(-n // TILE)
    return tiles * (BITMAP_BYTES + 4) + 4 + max(stored, 1) * itemsize


def pack(weight: np.ndarray, layout: str) -> Packed:
    """The stored form of ``weight`` [K, N] (float32, or int8 codes).

    Raises:
        ValueError: More values than an int32 offset can name.
    """
    tiles = to_tiles(weight, LAYOUTS[layout])
    stored = tiles != 0
    counts = stored.sum(axis=1)
    if counts.sum() >= 2**31:
        msg = f"the weight {weight.shape} has {counts.sum()} non-zero values, at most {2**31 - 1}"
        raise ValueError(msg)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = tiles[stored] if counts.any() else np.zeros(1, weight.dtype)
    bitmap = np.packbits(stored, axis=1, bitorder="little").view(np.int8)
    return Packed(bitmap, np.ascontiguousarray(values), offsets)


def unpack(packed: Packed, layout: str, k: int, n: int) -> np.ndarray:
    """The weight [k, n] of a stored form.

    Raises:
        ValueError: The arrays contradict each other.
    """
    tiles = -(-k // TILE) * -(-n // TILE)
    if packed.bitmap.shape != (tiles, BITMAP_BYTES) or packed.offsets.shape != (tiles + 1,):
        msg = (
            f"a weight [{k}, {n}] has {tiles} tiles: bitmap {packed.bitmap.shape} and offsets "
            f"{packed.offsets.shape} do not fit, expected ({tiles}, {BITMAP_BYTES}) and "
            f"({tiles + 1},)"
        )
        raise ValueError(msg)
    stored = np.unpackbits(packed.bitmap.view(np.uint8), axis=1, bitorder="little").astype(bool)
    counts = stored.sum(axis=1)
    begins, ends = packed.offsets[:-1].astype(np.int64), packed.offsets[1:].astype(np.int64)
    bad = (begins < 0) | (begins + counts > ends) | (ends > packed.values.size)
    if bad.any():
        tile = int(np.argmax(bad))
        msg = (
            f"tile {tile} has {counts[tile]} set bits, its values are {begins[tile]} to "
            f"{ends[tile]} of {packed.values.size}"
        )
        raise ValueError(msg)
    places = begins[:, None] + np.cumsum(stored, axis=1) - 1
    dense = np.where(stored, packed.values[np.where(stored, places, 0)], 0)
    whole = _from_tiles(dense.astype(packed.values.dtype), LAYOUTS[layout], k, n)
    if whole[k:].any() or whole[:, n:].any():
        msg = f"the bitmap has set bits outside of [{k}, {n}]"
        raise ValueError(msg)
    return np.ascontiguousarray(whole[:k, :n])


def to_tiles(weight: np.ndarray, layout: Layout) -> np.ndarray:
    """The weight [K, N] as tiles [T, 4096] in the order of the layout, padded with zeros."""
    k, n = weight.shape
    padded = np.pad(weight, ((0, -k % TILE), (0, -n % TILE)))
    tiles = padded.reshape(padded.shape[0] // TILE, TILE, -1, TILE).transpose(2, 0, 1, 3)
    turned = tuple(layout.dims[i] for i in layout.perm)
    back = tuple(int(i) for i in np.argsort(layout.perm))
    shaped = tiles.reshape(*tiles.shape[:2], *turned)
    return shaped.transpose(0, 1, *(2 + i for i in back)).reshape(-1, TILE * TILE)


def _from_tiles(tiles: np.ndarray, layout: Layout, k: int, n: int) -> np.ndarray:
    """[padded K, padded N]."""
    rows, columns = -(-k // TILE), -(-n // TILE)
    shaped = tiles.reshape(columns, rows, *layout.dims)
    turned = shaped.transpose(0, 1, *(2 + i for i in layout.perm))
    squares = turned.reshape(columns, rows, TILE, TILE)
    return squares.transpose(1, 2, 0, 3).reshape(rows * TILE, columns * TILE)
