"""Second moments of the inputs of layers, summed batch by batch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer.observers import valid_rows


class SecondMoments:
    """X'X of one activation [..., K] over valid tokens, H of SparseGPT and GPTQ but for a factor.

    Attributes:
        tokens: Number of rows summed.
        total: [K, K] float32: memory is 4 K^2 bytes, whatever the number of tokens.
    """

    def __init__(self, value: ir.Value) -> None:
        self.values: tuple[ir.Value, ...] = (value,)
        self.tokens = 0
        self.total = np.zeros((0, 0), np.float32)

    def update(self, arrays: tuple[np.ndarray, ...], valid: np.ndarray | None) -> None:
        """Take in one batch."""
        rows = valid_rows(arrays[0], valid).astype(np.float32, copy=False)
        if not rows.size:
            return
        if not self.tokens:
            self.total = np.zeros((rows.shape[1], rows.shape[1]), np.float32)
        self.tokens += len(rows)
        with np.errstate(over="ignore", invalid="ignore"):  # found by who reads the total
            self.total += rows.T @ rows
