"""Copies of arrays at the speed of memory."""

from __future__ import annotations

import numpy as np

#: What a processor reads and writes at once.
_LINE_BYTES = 64
#: Smaller arrays fit a cache, and are copied as they are.
_FROM_BYTES = 1 << 16


def contiguous_copy(array: np.ndarray) -> np.ndarray:
    """A copy in C order.

    numpy copies a transposed matrix in the order of the result, and so reads one number of each
    cache line that it fetches. Here whole lines are read and written.
    """
    if array.ndim != 2 or array.nbytes < _FROM_BYTES or not _is_transposed(array):
        return np.array(array, order="C", copy=True)
    result = np.empty(array.shape, array.dtype)
    step = max(1, _LINE_BYTES // array.itemsize)
    for start in range(0, array.shape[1], step):
        result[:, start : start + step] = array[:, start : start + step]
    return result


def _is_transposed(array: np.ndarray) -> bool:
    rows, columns = array.strides
    return 0 < rows < columns
