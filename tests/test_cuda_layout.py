"""Packing for the CUDA kernels: every position of a tile, and weights that a layout cannot hold."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cuda_weights import random_weight

from optimizer.custom_ops.cuda_layout import VALUE_BYTES, check_24, most_values, pack_cuda

SHAPES = [(64, 64), (70, 130), (1, 1), (200, 63)]


def tile_of(weight: np.ndarray, tile: int) -> np.ndarray:
    """[64, 64], zero outside of the weight: tile t = (n / 64) * ceil(K / 64) + k / 64."""
    rows = -(-weight.shape[0] // 64)
    k, n = tile % rows * 64, tile // rows * 64
    here = weight[k : k + 64, n : n + 64]
    return np.pad(here, ((0, 64 - here.shape[0]), (0, 64 - here.shape[1])))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", ["mma16", "mma8"])
def test_bits_and_values(shape, density, layout):
    weight = random_weight(shape, density, layout, "float16")
    packed = pack_cuda(weight, layout)
    assert packed.bitmap.dtype == np.int8
    assert packed.values.dtype == weight.dtype
    assert not np.any(packed.offsets * VALUE_BYTES[layout] % 16), "tiles begin at 16 bytes"
    assert most_values(packed) == np.diff(packed.offsets).max()
    for tile in range(len(packed.bitmap)):
        dense, at = tile_of(weight, tile), int(packed.offsets[tile])
        bits = np.unpackbits(packed.bitmap[tile].view(np.uint8), bitorder="little")
        for position in np.flatnonzero(bits):
            group, lane, e = position // 128, position % 128 // 4, position % 4
            nb, kb, h, g, t = group // 8, group // 2 % 4, group % 2, lane // 4, lane % 4
            k, n = 16 * t + 4 * kb + e, 16 * nb + 8 * h + g
            assert packed.values[at] == dense[k, n] != 0
            at += 1
        assert bits.sum() == np.count_nonzero(dense)
        assert at <= packed.offsets[tile + 1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("layout", "step", "lanes"), [("sp16", 32, 2), ("sp8", 64, 4)])
def test_fragments_and_metadata(shape, layout, step, lanes):
    """Read back as PTX describes mma.sp: 16 columns of the weight are the rows of A."""
    weight = random_weight(shape, "2:4", layout, "float16")
    packed = pack_cuda(weight, layout)
    assert np.diff(packed.offsets).tolist() == [2048] * len(packed.bitmap)
    for tile in range(len(packed.bitmap)):
        found = np.zeros((64, 64), weight.dtype)
        words = packed.bitmap[tile].view(np.uint32).reshape(32, 4)
        fragments = packed.values[packed.offsets[tile] :][:2048].reshape(4, 64 // step, 32, 4, -1)
        per = fragments.shape[-1]  # values of a register
        for nb, s, lane, register, i in np.ndindex(fragments.shape):
            g, t, h = lane // 4, lane % 4, register % 2
            column = per * t + i + 4 * per * (register // 2)  # of the stored half of A
            four = column // 2
            if layout == "sp16":
                word = words[4 * g + 2 * s + four // 4, nb] >> (16 * h)
                nibble = word >> (four % 4 * 4)
            else:
                nibble = words[4 * g + four // 8 * 2 + h, nb] >> (four % 8 * 4)
            first, second = int(nibble & 3), int(nibble >> 2 & 3)
            assert first < second, "ordered metadata"
            k = s * step + four * 4 + (second if column % 2 else first)
            found[k, nb * 16 + h * 8 + g] = fragments[nb, s, lane, register, i]
        np.testing.assert_array_equal(found, tile_of(weight, tile))
    assert lanes == step // 16


@pytest.mark.parametrize("layout", ["sp16", "sp8"])
def test_a_weight_that_is_not_2_of_4_is_named(layout):
    weight = random_weight((70, 9), "2:4", layout, "float16")
    weight[8:11, 5] = 1
    weight[64:70, 7] = 1
    message = r"in column 5, rows 8 to 11 have [34] values .* at most 2 \(2 of 162 groups"
    with pytest.raises(ValueError, match=message):
        pack_cuda(weight, layout)


def test_rows_of_a_last_group_end_with_the_weight():
    with pytest.raises(ValueError, match="rows 4 to 6 have 3 values"):
        check_24(np.pad(np.ones((3, 1)), ((4, 0), (0, 0))))


def test_what_does_not_fit_a_layout():
    with pytest.raises(ValueError, match="no CUDA layout 'mma4'"):
        pack_cuda(np.zeros((4, 4), np.float16), "mma4")
    with pytest.raises(ValueError, match="mma8 stores values of 1 bytes, got float16"):
        pack_cuda(np.zeros((4, 4), np.float16), "mma8")
    with pytest.raises(ValueError, match="sp16 stores values of 2 bytes, got int8"):
        pack_cuda(np.zeros((4, 4), np.int8), "sp16")


def test_bfloat16_keeps_its_type():
    for layout, density in (("mma16", 0.4), ("sp16", "2:4")):
        weight = random_weight((70, 70), density, layout, "bfloat16")
        assert pack_cuda(weight, layout).values.dtype == ml_dtypes.bfloat16
