"""Damaged weights in the CUDA layouts: the check on the host names what is wrong."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import cuda_emulated
import cuda_library
import numpy as np
import pytest
from cuda_weights import random_weight

from optimizer.custom_ops.cuda_layout import most_values, pack_cuda
from optimizer.custom_ops.packing import Packed

pytestmark = pytest.mark.native
SHAPE = (150, 70)
LAYOUTS = ("mma16", "mma8", "sp16", "sp8")


def packed(layout: str) -> Packed:
    density = "2:4" if layout.startswith("sp") else 0.4
    return pack_cuda(random_weight(SHAPE, density, layout, "float16"), layout)


def reason(
    layout: str, arrays: Packed, shape: tuple[int, int] = SHAPE, most: int = 0,
    scale: np.ndarray | None = None,
) -> str | None:  # fmt: skip
    addresses = {
        "bitmap": arrays.bitmap.ctypes.data,
        "values": arrays.values.ctypes.data,
        "offsets": arrays.offsets.ctypes.data,
    }
    if scale is not None:
        addresses["scale"] = scale.ctypes.data
    weight = cuda_library.weight(shape, layout, "float16", 0, addresses, most)
    found = cuda_emulated.library().optimize_cuda_validate(
        ctypes.byref(weight), arrays.bitmap.nbytes, arrays.values.size, arrays.offsets.size
    )
    return None if found is None else found.decode()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_packing_makes_is_sound(layout):
    arrays = packed(layout)
    scale = np.ones(SHAPE[1], np.float32)
    assert reason(layout, arrays, most=most_values(arrays), scale=scale) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes(layout):
    arrays = packed(layout)
    assert "bytes of the bitmap: found 3072, expected 1024" in reason(layout, arrays, (64, 70))
    assert "K and N must be between 1 and 2^31 - 1, found 0 and 70" in reason(
        layout, arrays, (0, 70)
    )
    if layout in ("mma8", "sp8"):
        found = reason(layout, arrays, (132105, 70))
        assert found == "K is 132105, with int8 values at most 132104"
    short = replace(arrays, offsets=arrays.offsets[:-1])
    assert reason(layout, short) == "number of offsets: found 6, expected 7"


@pytest.mark.parametrize("layout", ["mma16", "mma8"])
def test_offsets_and_bits(layout):
    arrays = packed(layout)
    few = replace(arrays, values=arrays.values[:-16])
    assert "tile 5 has" in reason(layout, few)
    for place, value, message in (
        (0, -16, "tile 0 has"),
        (1, 0, "tile 0 has"),
        (2, 2**31 - 16, "tile 1 has"),
        (0, 1, "set bits|expected multiples of"),
    ):
        offsets = arrays.offsets.copy()
        offsets[place] = value
        found = reason(layout, replace(arrays, offsets=offsets))
        assert found is not None
        assert any(part in found for part in message.split("|")), found
    more = replace(arrays, bitmap=np.full_like(arrays.bitmap, -1))
    assert "tile 0 has 4096 set bits" in reason(layout, more)
    outside = pack_cuda(np.ones((192, 128), arrays.values.dtype), layout)
    assert "tile 2 has bits outside of the weight [150, 70]" in reason(layout, outside)
    most = most_values(arrays)
    assert f"more than the {most - 1} that are said" in reason(layout, arrays, most=most - 1)


def test_room_for_more_than_a_tile():
    arrays = packed("mma16")
    values = np.zeros(2**16, arrays.values.dtype)
    offsets = np.array([0, 8192, 16384, 24576, 32768, 40960, 49152], np.int32)
    found = reason("mma16", Packed(arrays.bitmap, values, offsets))
    assert found == "tile 0 has room for 8192 values, expected at most 4096"


@pytest.mark.parametrize("layout", ["sp16", "sp8"])
def test_metadata(layout):
    arrays = packed(layout)
    bitmap = arrays.bitmap.copy()
    bitmap.reshape(-1)[700] = 0x04  # 0 and 1, then 0 and 0
    found = reason(layout, replace(arrays, bitmap=bitmap))
    assert "byte 700 of the metadata says that values 0 and 0 of four are stored" in found
    few = replace(arrays, values=arrays.values[:-1])
    assert reason(layout, few) == "number of values: found 12287, expected 12288"


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.inf, np.nan])
def test_scales(wrong):
    scale = np.ones(SHAPE[1], np.float32)
    scale[69] = wrong
    assert "scale of column 69 is" in reason("sp8", packed("sp8"), scale=scale)
