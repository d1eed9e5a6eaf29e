"""Bank conflicts of reading a tile's values from shared memory, by simulation.

A multiprocessor's shared memory has 32 banks of 4 bytes. A warp's read takes one wavefront for
each different word that the busiest bank must give. Reading 16-bit values one by one is what the
kernel for unstructured weights does most, so these wavefronts bound its rate.
"""

from __future__ import annotations

import numpy as np
import pytest

TILES = 8


def wavefronts(addresses: np.ndarray) -> np.ndarray:
    """Of reads [R, 32] at these bytes (of 4 bytes or fewer, none across two words)."""
    words = np.sort(addresses // 4, axis=1)
    first = np.concatenate([np.ones((len(words), 1), bool), words[:, 1:] != words[:, :-1]], axis=1)
    banks = np.zeros((len(words), 32), int)
    rows = np.broadcast_to(np.arange(len(words))[:, None], words.shape)
    np.add.at(banks, (rows[first], words[first] % 32), 1)
    return banks.max(axis=1)


def nibble_reads(bits: np.ndarray, value_bytes: int) -> np.ndarray:
    """Where the values of each lane's nibble begin: bytes [T * 32 groups, 32 lanes]."""
    counts = bits.reshape(len(bits), 32, 32, 4).sum(axis=3)
    starts = np.cumsum(counts.reshape(len(bits), -1), axis=1) - counts.reshape(len(bits), -1)
    return starts.reshape(-1, 32) * value_bytes


def mma16_reads(bits: np.ndarray) -> np.ndarray:
    """Four reads of 16 bits for each group: decode.cu, four(__half)."""
    starts = nibble_reads(bits, 2)
    nibbles = bits.reshape(-1, 32, 4)
    before = np.cumsum(nibbles, axis=2) - nibbles
    return np.concatenate([starts + 2 * before[:, :, e] for e in range(4)])


def mma8_reads(bits: np.ndarray) -> np.ndarray:
    """Two words for each group: decode.cu, four(int8_t)."""
    words = nibble_reads(bits, 1) // 4 * 4
    return np.concatenate([words, words + 4])


def runs_of_lanes_reads(bits: np.ndarray) -> np.ndarray:
    """The order before: each lane has 128 positions of its own, and so one run of values."""
    lanes = bits.reshape(len(bits), 32, 128)
    own = lanes.sum(axis=2)
    starts = (np.cumsum(own, axis=1) - own)[:, :, None]
    before = np.cumsum(lanes, axis=2) - lanes
    return (2 * (starts + before)).transpose(0, 2, 1).reshape(-1, 32)


def mean_wavefronts(reads, zeros: float) -> float:
    rng = np.random.default_rng(0)
    bits = (rng.random((TILES, 4096)) >= zeros).astype(int)
    return float(wavefronts(reads(bits)).mean())


def test_wavefronts_of_known_reads():
    lanes = np.arange(32)
    assert wavefronts(np.stack([lanes * 4, lanes * 0, lanes * 2])).tolist() == [1, 1, 1]
    assert wavefronts(np.stack([lanes * 8, lanes * 128, lanes * 64])).tolist() == [2, 32, 16]


@pytest.mark.parametrize(("zeros", "most"), [(0.5, 1.45), (0.6, 1.15), (0.7, 1.05), (0.8, 1.05)])
def test_values_of_a_group_lie_side_by_side(zeros, most):
    """A group's 128 weights have 256 bytes at most, at 50 % zeros about the 128 of all banks."""
    assert mean_wavefronts(mma16_reads, zeros) <= most


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.6, 0.7, 0.8])
def test_bytes_of_a_group_meet_no_conflicts(zeros):
    """128 bytes at most, read as words: at most one more than the 32 words of all banks."""
    assert mean_wavefronts(mma8_reads, zeros) <= 1.01


@pytest.mark.parametrize("zeros", [0.5, 0.6, 0.7, 0.8])
def test_runs_of_lanes_met_more_than_twice_as_many(zeros):
    """Why the order was changed."""
    before, now = mean_wavefronts(runs_of_lanes_reads, zeros), mean_wavefronts(mma16_reads, zeros)
    assert before > 3
    assert before > 2 * now


@pytest.mark.parametrize(
    ("row_bytes", "turn"), [(128, lambda t: t & 7), (64, lambda t: t >> 1 & 3)]
)
def test_a_matrix_of_x_meets_no_conflicts(row_bytes, turn):
    """sparse24.cu, Shape::place: ldmatrix reads 16 bytes of eight tokens at a time."""
    for chunk in range(row_bytes // 16):
        starts = np.array([t * row_bytes + (chunk ^ turn(t)) * 16 for t in range(8)])
        words = (starts[:, None] + np.arange(0, 16, 4)).reshape(1, 32)
        assert wavefronts(words).tolist() == [1]
    places = {t * row_bytes + (c ^ turn(t)) * 16 for t in range(8) for c in range(row_bytes // 16)}
    assert len(places) == 8 * row_bytes // 16, "each chunk has a place of its own"


def test_sums_of_many_tokens_are_written_without_conflicts():
    """sparse24.cu, kPitch: lane 4 g + t writes token 2 t, column g."""
    lanes = np.arange(32)
    words = (2 * (lanes % 4) * (64 + 4) + lanes // 4) * 4
    assert wavefronts(words[None]).tolist() == [1]
