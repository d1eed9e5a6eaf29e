"""What quantization needs to know about the input of a site, in constant memory."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer.observers import valid_rows

#: Sample rows kept per site: at most this many, and at most this many numbers. Enough rows for a
#: covariance of full rank at usual widths; 12 layers of a 768-wide model keep about 100 MB.
MAX_ROWS = 1024
MAX_NUMBERS = 1 << 20


class InputStatistics:
    """Range, mean and sample rows of one activation [..., K] over valid tokens.

    Rows are kept at a stride that doubles when the store is full, so that they are spread evenly
    over all samples, whatever their number, and the same on every run.

    Attributes:
        tokens: Number of rows seen.
        minimum, maximum: [K] float64.
    """

    def __init__(self, value: ir.Value) -> None:
        self.values: tuple[ir.Value, ...] = (value,)
        self.tokens = 0
        self.minimum = np.empty(0)
        self.maximum = np.empty(0)
        self._sum = np.empty(0)
        self._stride = 1
        self._kept: list[np.ndarray] = []
        self._count = 0

    def update(self, arrays: tuple[np.ndarray, ...], valid: np.ndarray | None) -> None:
        """Take in one batch."""
        rows = valid_rows(arrays[0], valid)
        if not rows.size:
            return
        low, high = rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64)
        total = rows.sum(axis=0, dtype=np.float64)
        if self.tokens:
            low, high = np.minimum(low, self.minimum), np.maximum(high, self.maximum)
            total = total + self._sum
        self.minimum, self.maximum, self._sum = low, high, total
        self._keep(rows)
        self.tokens += len(rows)

    def _keep(self, rows: np.ndarray) -> None:
        first = -self.tokens % self._stride
        chosen = np.array(rows[first :: self._stride], np.float32)
        self._kept.append(chosen)
        self._count += len(chosen)
        capacity = max(16, min(MAX_ROWS, MAX_NUMBERS // rows.shape[1]))
        while self._count > capacity:
            self._stride *= 2
            self._kept = [np.concatenate(self._kept)[::2]]
            self._count = len(self._kept[0])

    @property
    def mean(self) -> np.ndarray:
        """[K] float64."""
        result: np.ndarray = self._sum / max(1, self.tokens)
        return result

    @property
    def rows(self) -> np.ndarray:
        """[R, K] float32, tokens in the order seen."""
        if not self._kept:
            return np.empty((0, 0), np.float32)
        if len(self._kept) > 1:
            self._kept = [np.concatenate(self._kept)]
        return self._kept[0]
