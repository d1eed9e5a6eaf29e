"""Copies are equal, contiguous, and share no memory, whatever the layout."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from optimizer.arrays import contiguous_copy


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.bool_, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(300, 517), (1, 90000), (90000, 1), (3, 5), (0, 7)])
def test_transposed_matrices(dtype, shape):
    array = np.random.default_rng(0).integers(-5, 5, shape).astype(dtype)
    for view in (array, array.T, array[:, ::2].T, array.T[::-1], array[::-1].T):
        copy = contiguous_copy(view)
        assert copy.flags.c_contiguous
        assert copy.dtype == view.dtype
        assert not np.shares_memory(copy, view)
        np.testing.assert_array_equal(copy, view)


def test_other_ranks():
    array = np.arange(1 << 16, dtype=np.float32)
    for view in (array, array.reshape(4, 2, -1).T, array[:1].reshape(()), np.broadcast_to(3.0, 9)):
        copy = contiguous_copy(view)
        assert copy.flags.c_contiguous
        np.testing.assert_array_equal(copy, view)
