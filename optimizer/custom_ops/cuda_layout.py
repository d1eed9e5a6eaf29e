"""Stored form of weights for the CUDA kernels, in the order of tensor-core fragments.

``mma16`` and ``mma8`` are bitmap and values (plugins/sparse_matmul/cuda/decode.cu); ``sp16`` and
``sp8`` are the values and metadata of 2:4 sparsity along K (sparse24.cu). Tiles of 64 x 64 come in
the order of ``packing.to_tiles``: all of a strip of 64 columns, then the next strip.
"""

from __future__ import annotations

import numpy as np

from optimizer.custom_ops.declaration import BITMAP_BYTES, LAYOUTS, TILE, Layout, layout_of
from optimizer.custom_ops.packing import Packed, to_tiles, unpack

#: Values of a tile begin at multiples of this many bytes.
ALIGNMENT = 16
#: Stored values of a tile of 2:4 sparsity.
VALUES_24 = TILE * TILE // 2

#: What the kernels call them (enum Layout in kernels.h), and bytes of a value.
LAYOUT_CODES = {"mma16": 16, "mma8": 17, "sp16": 18, "sp8": 19}
VALUE_BYTES = {"mma16": 2, "mma8": 1, "sp16": 2, "sp8": 1}


def pack_cuda(weight: np.ndarray, layout: str) -> Packed:
    """The stored form of ``weight`` [K, N].

    Args:
        weight: 16-bit numbers, or int8 codes for ``mma8`` and ``sp8``.
        layout: A key of ``LAYOUT_CODES``.

    Returns:
        ``bitmap`` int8 [T, 512] (for ``sp16`` and ``sp8`` the metadata), ``values`` [V] of the
        type of ``weight``, ``offsets`` int32 [T + 1].

    Raises:
        ValueError: No such layout, values of another size, too many values, or a weight that is
            not 2:4 along K where the layout needs it.
    """
    if layout not in LAYOUT_CODES:
        msg = f"no CUDA layout '{layout}', expected one of {', '.join(LAYOUT_CODES)}"
        raise ValueError(msg)
    if weight.dtype.itemsize != VALUE_BYTES[layout]:
        msg = f"layout {layout} stores values of {VALUE_BYTES[layout]} bytes, got {weight.dtype}"
        raise ValueError(msg)
    return _pack_24(weight) if layout in ("sp16", "sp8") else _pack_bitmap(weight, LAYOUTS[layout])


def unpack_cuda(packed: Packed, layout: str, k: int, n: int) -> np.ndarray:
    """The weight [k, n] of a stored form.

    Raises:
        ValueError: There is no such layout, or the arrays contradict each other.
    """
    form = layout_of(layout)
    if isinstance(form, Layout):
        return unpack(packed, layout, k, n)
    rows, columns = -(-k // TILE), -(-n // TILE)
    tiles = rows * columns
    if packed.bitmap.shape != (tiles, BITMAP_BYTES) or packed.values.size != tiles * VALUES_24:
        msg = (
            f"a weight [{k}, {n}] has {tiles} tiles: metadata {packed.bitmap.shape} and "
            f"{packed.values.size} values do not fit, expected ({tiles}, {BITMAP_BYTES}) and "
            f"{tiles * VALUES_24}"
        )
        raise ValueError(msg)
    octets = packed.bitmap.view(np.uint8)
    halves = np.stack([octets % 16, octets // 16], axis=-1).reshape(tiles, *form.nibbles)
    nibbles = halves.transpose(0, *(1 + i for i in form.nibbles_perm)).reshape(tiles, TILE, -1)
    places = np.stack([nibbles % 4, nibbles // 4], axis=-1)
    if (places[..., 0] >= places[..., 1]).any():
        msg = f"tile {int(np.argwhere(places[..., 0] >= places[..., 1])[0, 0])}: unsound metadata"
        raise ValueError(msg)
    values = packed.values.reshape(tiles, *form.values)
    values = values.transpose(0, *(1 + i for i in form.values_perm)).reshape(places.shape)
    fours = np.zeros((*nibbles.shape, 4), packed.values.dtype)
    np.put_along_axis(fours, places.astype(np.int64), values, axis=-1)
    squares = fours.reshape(columns, rows, TILE, TILE).transpose(1, 3, 0, 2)
    whole = squares.reshape(rows * TILE, columns * TILE)
    if whole[k:].any() or whole[:, n:].any():
        msg = f"there are values outside of [{k}, {n}]"
        raise ValueError(msg)
    return np.ascontiguousarray(whole[:k, :n])


def most_values(packed: Packed) -> int:
    """The most values of a tile, gaps included (``Weight::most_values`` of kernels.h)."""
    return int(np.diff(packed.offsets).max(initial=0))


def _pack_bitmap(weight: np.ndarray, layout: Layout) -> Packed:
    """Gaps between tiles are zeros."""
    tiles = to_tiles(weight, layout)
    stored = tiles != 0
    unit = ALIGNMENT // weight.dtype.itemsize
    padded = -(-stored.sum(axis=1) // unit) * unit
    offsets = _offsets(padded, weight.shape)
    values = np.zeros(max(int(offsets[-1]), unit), weight.dtype)
    places = offsets[:-1, None].astype(np.int64) + np.cumsum(stored, axis=1) - 1
    values[places[stored]] = tiles[stored]
    bitmap = np.packbits(stored, axis=1, bitorder="little").view(np.int8)
    return Packed(bitmap, values, offsets)


def _pack_24(weight: np.ndarray) -> Packed:
    """Fragments and metadata of ``mma.sp``, as sparse24.cu describes them."""
    k, n = weight.shape
    padded = np.pad(weight, ((0, -k % TILE), (0, -n % TILE)))
    fours = padded.reshape(-1, 4, padded.shape[1])  # [K / 4, 4, N]
    check_24(weight)
    # The stored ones first, in their order, then as many others as make two; both ascending.
    order = np.argsort(fours == 0, axis=1, kind="stable")[:, :2]
    places = np.sort(order, axis=1).transpose(2, 0, 1)  # [N, K / 4, 2]
    kept = np.take_along_axis(fours.transpose(2, 0, 1), places, axis=2)
    nibbles = (places[..., 0] | places[..., 1] << 2).astype(np.uint32)
    columns, rows = padded.shape[1] // TILE, padded.shape[0] // TILE
    tiles = columns * rows
    # [strip, nb, h, g, tile along K, 16 fours of it (, 2)]
    kept = kept.reshape(columns, 4, 2, 8, rows, TILE // 4, 2)
    nibbles = nibbles.reshape(columns, 4, 2, 8, rows, TILE // 4)
    if weight.dtype.itemsize == 2:
        # fours: s 2, q 2 (registers 0-1 or 2-3), t 4; values: [nb, s, g, t, q, h, 2]
        shaped = kept.reshape(columns, 4, 2, 8, rows, 2, 2, 4, 2)
        values = shaped.transpose(0, 4, 1, 5, 3, 7, 6, 2, 8)
        # fours: s 2, u 2 (t % 2), 4 nibbles; word: [g, s, u, nb] of h 2 and the nibbles
        words = nibbles.reshape(columns, 4, 2, 8, rows, 4, 4).transpose(0, 4, 3, 5, 1, 2, 6)
    else:
        # fours: q 2, t 4, 2 of a register; values: [nb, g, t, q, h, 2, 2]
        shaped = kept.reshape(columns, 4, 2, 8, rows, 2, 4, 2, 2)
        values = shaped.transpose(0, 4, 1, 3, 6, 5, 2, 7, 8)
        # fours: v 2 (t / 2), 8 nibbles; word: [g, v, h, nb] of the nibbles
        words = nibbles.reshape(columns, 4, 2, 8, rows, 2, 8).transpose(0, 4, 3, 5, 2, 1, 6)
    shifted = words.reshape(tiles, BITMAP_BYTES // 4, 8) << np.arange(0, 32, 4, dtype=np.uint32)
    metadata = np.bitwise_or.reduce(shifted, axis=2).astype("<u4").view(np.int8)
    flat = np.ascontiguousarray(values).reshape(-1)
    offsets = _offsets(np.full(tiles, VALUES_24), weight.shape)
    return Packed(metadata, flat, offsets)


def check_24(weight: np.ndarray) -> None:
    """That of every four neighbours along K at most two are not zero.

    Raises:
        ValueError: Which column and rows have more, first, and how many such fours there are.
    """
    k, n = weight.shape
    counts = (np.pad(weight, ((0, -k % 4), (0, 0))) != 0).reshape(-1, 4, n).sum(axis=1)
    bad = np.argwhere(counts.T > 2)
    if bad.size:
        column, four = (int(i) for i in bad[0])
        msg = (
            f"the weight [{k}, {n}] is not 2:4 sparse along K: in column {column}, rows {4 * four} "
            f"to {min(4 * four + 3, k - 1)} have {counts[four, column]} values that are not zero, "
            f"expected at most 2 ({len(bad)} of {counts.size} groups of four have more); prune it "
            "to 2:4, or use an unstructured layout"
        )
        raise ValueError(msg)


def _offsets(counts: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Int32 [T + 1]."""
    total = int(counts.sum())
    if total >= 2**31:
        msg = f"the weight {shape} has {total} stored values, at most {2**31 - 1}"
        raise ValueError(msg)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
