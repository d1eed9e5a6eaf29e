"""Statistics of activations, accumulated batch by batch in constant memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from optimizer.metrics import row_cosine


class Observer(Protocol):
    """Looks at some values of a model while samples run through it.

    Attributes:
        values: Live values of the model: activations of the main graph, inputs or outputs.
    """

    values: tuple[ir.Value, ...]

    def update(self, arrays: tuple[np.ndarray, ...], valid: np.ndarray | None) -> None:
        """Take in one batch.

        Args:
            arrays: One per value, in the order of ``values``.
            valid: [B, S] bool, tokens that are not padding; None = all.
        """
        ...


def valid_rows(array: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """The rows of an activation that belong to valid tokens.

    Args:
        array: [B, S, ..., C], [B, H, S, C] or [B*S, C]; anything else has no token axis, and all
            its rows count.
        valid: [B, S] bool or None.

    Returns:
        [rows, C].
    """
    if array.ndim == 0:
        return array.reshape(1, 1)
    if array.ndim == 1:
        return array.reshape(1, -1)
    width = array.shape[-1]
    if valid is not None:
        if array.ndim >= 3 and array.shape[:2] == valid.shape:
            array = array[valid]
        elif array.ndim == 4 and (array.shape[0], array.shape[2]) == valid.shape:
            array = array.transpose(0, 2, 1, 3)[valid]
        elif array.ndim == 2 and array.shape[0] == valid.size:
            array = array[valid.ravel()]
    return array.reshape(-1, width)


class ChannelRange:
    """Range of every channel (last axis) over valid tokens.

    Attributes:
        minimum: [C] float32.
        maximum: [C] float32.
        tokens: Number of rows seen.
    """

    def __init__(self, value: ir.Value) -> None:
        self.values: tuple[ir.Value, ...] = (value,)
        self.tokens = 0
        self._low: np.ndarray | None = None
        self._high: np.ndarray | None = None

    def update(self, arrays: tuple[np.ndarray, ...], valid: np.ndarray | None) -> None:
        """Take in one batch."""
        rows = valid_rows(arrays[0], valid)
        if not len(rows):
            return
        self.tokens += len(rows)
        low, high = rows.min(axis=0), rows.max(axis=0)
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)

    @property
    def minimum(self) -> np.ndarray:
        """[C] float32."""
        return _seen(self._low, self.values[0]).astype(np.float32)

    @property
    def maximum(self) -> np.ndarray:
        """[C] float32."""
        return _seen(self._high, self.values[0]).astype(np.float32)

    @property
    def absolute(self) -> np.ndarray:
        """[C] float32: max |x|."""
        result: np.ndarray = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        return result


class ChannelSquareSum:
    """Sum of squares of every channel over valid tokens (Wanda's ||X_c||^2).

    Attributes:
        tokens: Number of rows summed.
    """

    def __init__(self, value: ir.Value) -> None:
        self.values: tuple[ir.Value, ...] = (value,)
        self.tokens = 0
        self._sum: np.ndarray | None = None

    def update(self, arrays: tuple[np.ndarray, ...], valid: np.ndarray | None) -> None:
        """Take in one batch."""
        rows = valid_rows(arrays[0], valid)
        if not len(rows):
            return
        self.tokens += len(rows)
        squares = np.einsum("rc,rc->c", rows, rows, dtype=np.float64)
        self._sum = squares if self._sum is None else self._sum + squares

    @property
    def total(self) -> np.ndarray:
        """[C] float64."""
        return _seen(self._sum, self.values[0])


class RowMaximum:
    """Range over rows of max |row|: what a per-token scale has to span.

    Attributes:
        minimum: Smallest non-zero row maximum.
        maximum: Largest.
        tokens: Number of rows seen.
    """

    def __init__(self, value: ir.Value) -> None:
        self.values: tuple[ir.Value, ...] = (value,)
        self.tokens = 0
        self.minimum = float("inf")
        self.maximum = 0.0

    def update(self, arrays: tuple[np.ndarray, ...], valid: np.ndarray | None) -> None:
        """Take in one batch."""
        rows = valid_rows(arrays[0], valid)
        if not rows.size:
            return
        self.tokens += len(rows)
        peaks = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        self.maximum = max(self.maximum, float(peaks.max()))
        used = peaks[peaks > 0]
        if len(used):
            self.minimum = min(self.minimum, float(used.min()))


class Extreme:
    """The largest number that a value ever has, or the smallest.

    For values that hold one number computed from an activation inside of the model. Padding is
    part of such a number.

    Attributes:
        found: The number; None before one was seen.
    """

    def __init__(self, value: ir.Value, *, largest: bool) -> None:
        self.values: tuple[ir.Value, ...] = (value,)
        self.found: float | None = None
        self._choose = max if largest else min

    def update(self, arrays: tuple[np.ndarray, ...], valid: np.ndarray | None) -> None:
        """Take in one batch."""
        del valid
        number = float(arrays[0])
        if not np.isnan(number):
            self.found = number if self.found is None else self._choose(self.found, number)


class TokenCosine:
    """Mean cosine between pairs of values [B, S, D], over valid tokens.

    Attributes:
        tokens: Number of rows each mean is taken over.
    """

    def __init__(
        self, pairs: Sequence[tuple[ir.Value, ir.Value]], *, skip_first: bool = True
    ) -> None:
        """Start empty.

        Args:
            pairs: Values to compare, equal in shape.
            skip_first: Leave out the first valid token of every row: its norm is huge in many
                language models, and it is alike at all depths.
        """
        unique = dict.fromkeys(value for pair in pairs for value in pair)
        position = {value: i for i, value in enumerate(unique)}
        self.values: tuple[ir.Value, ...] = tuple(unique)
        self._pairs = [(position[a], position[b]) for a, b in pairs]
        self._skip_first = skip_first
        self._sums = np.zeros(len(pairs))
        self.tokens = 0

    def update(self, arrays: tuple[np.ndarray, ...], valid: np.ndarray | None) -> None:
        """Take in one batch."""
        if not arrays:
            return
        if self._skip_first and arrays[0].ndim == 3:
            valid = _without_first(valid, arrays[0].shape[:2])
        rows = [valid_rows(array, valid) for array in arrays]
        self.tokens += len(rows[0])
        for i, (a, b) in enumerate(self._pairs):
            self._sums[i] += row_cosine(rows[a], rows[b]).sum()

    @property
    def cosine(self) -> np.ndarray:
        """[pairs] float64, in the order given; NaN before any token was seen."""
        return self._sums / self.tokens if self.tokens else np.full(len(self._sums), np.nan)


def _without_first(valid: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    kept = np.ones(shape, bool) if valid is None else valid.copy()
    if shape[1]:
        kept[np.arange(shape[0]), kept.argmax(axis=1)] = False
    return kept


def _seen(array: np.ndarray | None, value: ir.Value) -> np.ndarray:
    if array is None:
        raise ValueError(f"no valid token of '{value.name}' has been observed")
    return array
