"""What becomes of stored numbers in half precision: counted while they stream by.

Weights are read once, a piece at a time, and never kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import dims
from optimizer.precision.limits import Format

#: Numbers looked at together.
_PIECE = 1 << 16
#: How much of a constant may get lost, in units of what rounding changes in it at most anyway.
_LOST = 8.0


@dataclass(frozen=True)
class Numbers:
    """A constant in the light of a format.

    Attributes:
        count: How many numbers it has.
        lowest, highest: Of the finite ones; 0 where there are none.
        overflowing: Finite numbers that would become infinite.
        vanishing: Numbers that would become zero.
        shortened: Numbers that would lose bits because they are small, but not all.
        lost: Norm of what small numbers lose, relative to the norm of the constant.
    """

    count: int = 0
    lowest: float = 0.0
    highest: float = 0.0
    overflowing: int = 0
    vanishing: int = 0
    shortened: int = 0
    lost: float = 0.0

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.lowest), abs(self.highest))

    def fault(self, name: str, format_: Format) -> str | None:
        """Why the constant ``name`` cannot be stored in ``format_``, or None."""
        if self.overflowing:
            return (
                f"constant '{name}' holds {_signed(self):.4g}, {format_.name} ends at "
                f"{format_.largest:.6g}"
            )
        if self.lost > _LOST * format_.roundoff:
            what = f"is {_signed(self):.3g}" if self.count == 1 else "is too small as a whole"
            return f"constant '{name}' {what}, {format_.name} is precise from {format_.tiny:.2g} on"
        return None


def _signed(numbers: Numbers) -> float:
    return max(numbers.lowest, numbers.highest, key=abs)


def look(tensor: ir.TensorProtocol, format_: Format) -> Numbers:
    """Read a constant once."""
    flat = tensor.numpy().reshape(-1)
    low, high = math.inf, -math.inf
    overflowing = vanishing = shortened = 0
    squares = change = 0.0
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].astype(np.float32)
        finite = np.isfinite(piece)
        piece = piece if finite.all() else piece[finite]
        if not piece.size:
            continue
        low, high = min(low, float(piece.min())), max(high, float(piece.max()))
        size = np.abs(piece)
        fits = size < np.float32(format_.end)
        overflowing += int(size.size - np.count_nonzero(fits))
        within = size if fits.all() else size[fits]
        squares += float(np.square(within, dtype=np.float64).sum())
        small = size[(size < np.float32(format_.tiny)) & (size > 0)]
        narrow = small.astype(format_.dtype.numpy()).astype(np.float32)
        vanishing += int(np.count_nonzero(narrow == 0))
        shortened += int(np.count_nonzero((narrow != small) & (narrow != 0)))
        change += float(np.square(small - narrow, dtype=np.float64).sum())
    del flat
    graphs.release(tensor)
    return Numbers(
        count=tensor.size,
        lowest=low if low <= high else 0.0,
        highest=high if low <= high else 0.0,
        overflowing=overflowing,
        vanishing=vanishing,
        shortened=shortened,
        lost=math.sqrt(change / squares) if squares else 0.0,
    )


def narrowed(value: ir.Value, dtype: ir.DataType) -> ir.LazyTensor:
    """A constant in another floating type, converted each time it is read."""
    return graphs.derived(value, dims(value) or (), lambda a: a.astype(dtype.numpy()), dtype)
