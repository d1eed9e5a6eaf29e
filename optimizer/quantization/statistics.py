"""What quantization needs to know about the input of a site, in constant memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from optimizer.observers import valid_rows

#: Sample rows kept per site: at most this many, and at most this many numbers. Enough rows for a
#: covariance of full rank at usual widths; 12 layers of a 768-wide model keep about 100 MB.
MAX_ROWS = 1024
MAX_NUMBERS = 1 << 20


@dataclass
class Half:
    """Range and sample rows of one half of the tokens.

    Attributes:
        minimum, maximum: [K] float64; infinite before the first token.
    """

    minimum: np.ndarray
    maximum: np.ndarray
    tokens: int = 0
    _stride: int = 1
    _count: int = 0
    _kept: list[np.ndarray] = field(default_factory=list)

    def update(self, rows: np.ndarray) -> None:
        """Take in rows [R, K]."""
        if not len(rows):
            return
        np.minimum(self.minimum, rows.min(axis=0), out=self.minimum)
        np.maximum(self.maximum, rows.max(axis=0), out=self.maximum)
        first = -self.tokens % self._stride
        chosen = np.array(rows[first :: self._stride], np.float32)
        self.tokens += len(rows)
        self._kept.append(chosen)
        self._count += len(chosen)
        capacity = max(8, min(MAX_ROWS, MAX_NUMBERS // rows.shape[1]) // 2)
        while self._count > capacity:
            self._stride *= 2
            self._kept = [np.concatenate(self._kept)[::2]]
            self._count = len(self._kept[0])

    @property
    def rows(self) -> np.ndarray:
        """[R, K] float32, spread evenly over the tokens seen."""
        if len(self._kept) > 1:
            self._kept = [np.concatenate(self._kept)]
        return self._kept[0] if self._kept else np.empty((0, len(self.minimum)), np.float32)


class InputStatistics:
    """Range, mean and sample rows of one activation [..., K] over valid tokens.

    Rows are kept at a stride that doubles when the store is full, so that they are spread evenly
    over all samples, whatever their number, and the same on every run. The first half of every
    batch and the second are kept apart: what one half does to the ranges of the other tells how
    far the ranges carry over to unseen data.

    Attributes:
        tokens: Number of rows seen.
    """

    def __init__(self, value: ir.Value) -> None:
        self.values: tuple[ir.Value, ...] = (value,)
        self.tokens = 0
        self.halves: tuple[Half, ...] = ()
        self._sum = np.empty(0)

    def update(self, arrays: tuple[np.ndarray, ...], valid: np.ndarray | None) -> None:
        """Take in one batch."""
        rows = valid_rows(arrays[0], valid)
        if not rows.size:
            return
        if not self.halves:
            width = rows.shape[1]
            self._sum = np.zeros(width)
            self.halves = tuple(
                Half(np.full(width, np.inf), np.full(width, -np.inf)) for _ in range(2)
            )
        middle = (len(rows) + 1) // 2
        # Alternating gives both halves the same number of tokens where a batch is one token.
        first, second = self.halves if self.tokens % 2 == 0 else self.halves[::-1]
        first.update(rows[:middle])
        second.update(rows[middle:])
        self._sum += rows.sum(axis=0, dtype=np.float64)
        self.tokens += len(rows)

    @property
    def minimum(self) -> np.ndarray:
        """[K] float64."""
        result: np.ndarray = np.min([half.minimum for half in self.halves], axis=0)
        return result

    @property
    def maximum(self) -> np.ndarray:
        """[K] float64."""
        result: np.ndarray = np.max([half.maximum for half in self.halves], axis=0)
        return result

    @property
    def mean(self) -> np.ndarray:
        """[K] float64."""
        result: np.ndarray = self._sum / max(1, self.tokens)
        return result

    @property
    def rows(self) -> np.ndarray:
        """[R, K] float32, of both halves."""
        return np.concatenate([half.rows for half in self.halves])
