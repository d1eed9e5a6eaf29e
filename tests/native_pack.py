"""The arrays of a packed weight in the order in which the C interface takes them."""

from __future__ import annotations

from numpy.typing import NDArray

from optimizer.custom_ops import packing
from optimizer.custom_ops.declaration import TILE

__all__ = ["N16K4", "N64K1", "TILE", "pack"]

#: Numbers of the enum Layout.
N64K1, N16K4 = 0, 1
_NAMES = {N64K1: "n64k1", N16K4: "n16k4"}


def pack(weight: NDArray, layout: int) -> tuple[NDArray, NDArray, NDArray]:
    """(bitmap uint8 [T, 512], offsets int32 [T + 1], values [V]) of `weight` [K, N]."""
    packed = packing.pack(weight, _NAMES[layout])
    return packed.bitmap.view("uint8"), packed.offsets, packed.values
