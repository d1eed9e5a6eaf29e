"""The layout of the CUDA kernels: what each lane of a warp reads, played in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.custom_ops.cuda_layout import ALIGNMENT, pack_mma16


def lane_weights(packed, tile: int) -> np.ndarray:
    """The A registers [lane, k / 16, n / 16, 4, 2], filled as cuda/decode.cu does it."""
    words = packed.bitmap[tile].view(np.uint32).reshape(32, 4)
    own = np.array([[int(w).bit_count() for w in lane] for lane in words]).sum(axis=1)
    starts = packed.offsets[tile] + np.cumsum(own) - own
    out = np.zeros((32, 4, 4, 4, 2), np.float32)
    for lane in range(32):
        run = int(starts[lane])
        for fk in range(4):
            for fn in range(4):
                byte = int(words[lane, fk]) >> (fn * 8)
                for r in range(4):
                    low, high = byte >> (2 * r) & 1, byte >> (2 * r + 1) & 1
                    v0 = packed.values[run] if low else 0
                    v1 = packed.values[run + low] if high else 0
                    out[lane, fk, fn, r] = v0, v1
                    run += low + high
        assert run == starts[lane] + own[lane]
    return out


def operand_a(registers: np.ndarray) -> np.ndarray:
    """A [16, 16] of mma.m16n8k16 from the registers [lane, 4, 2] (PTX ISA, fragments for .f16)."""
    a = np.zeros((16, 16), np.float32)
    for lane in range(32):
        group, in_group = lane // 4, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            column = in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
            a[row, column] = registers[lane, i // 2, i % 2]
    return a


@pytest.mark.parametrize("shape", [(64, 64), (70, 130), (1, 1), (200, 63)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_lanes_read_the_weight(shape, density):
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal(shape) * (rng.random(shape) < density)).astype(np.float16)
    packed = pack_mma16(weight)
    assert not np.any(packed.offsets % ALIGNMENT)
    k, n = (-(-size // 64) * 64 for size in shape)
    found = np.zeros((k, n), np.float32)
    for tile in range(k // 64 * (n // 64)):
        row, column = tile % (k // 64) * 64, tile // (k // 64) * 64
        registers = lane_weights(packed, tile)
        for fk in range(4):
            for fn in range(4):
                here = operand_a(registers[:, fk, fn])
                found[row + fk * 16 :, column + fn * 16 :][:16, :16] = here.T
    np.testing.assert_array_equal(found[: shape[0], : shape[1]], weight)
    assert not found[shape[0] :].any()
    assert not found[:, shape[1] :].any()
