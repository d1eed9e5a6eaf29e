"""Values of a random graph, and the sizes that their dimensions take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx

Shape = tuple[int, ...]

FLOAT, INT64, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL

DTYPES: dict[int, Any] = {
    FLOAT: np.float32,
    onnx.TensorProto.DOUBLE: np.float64,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    INT64: np.int64,
    onnx.TensorProto.INT32: np.int32,
    onnx.TensorProto.INT8: np.int8,
    onnx.TensorProto.UINT8: np.uint8,
    BOOL: np.bool_,
}

#: Sizes of the named dimensions, one column per feed: ordinary, single, and sometimes empty.
ORDINARY = {"B": (2, 1, 3), "S": (3, 5, 1), "T": (4, 1, 2)}

EMPTY = {"B": (2, 1, 0), "S": (3, 0, 2), "T": (4, 3, 1)}


@dataclass(frozen=True)
class Value:
    """A value and its shape under each assignment.

    Attributes:
        name: In the graph.
        dtype: Element type.
        shapes: One per assignment, of equal rank.
        exact: Whether it holds integers, or floats that no rounding has touched: only of these may
            an operator look at the sign, the order or the nearest integer, because the smallest
            legitimate difference could tip it.
        numbers: Of a constant.
        known: What it holds under each assignment, where that is integers.
    """

    name: str
    dtype: int
    shapes: tuple[Shape, ...]
    exact: bool = False
    numbers: np.ndarray | None = None
    known: tuple[np.ndarray, ...] | None = None

    @property
    def rank(self) -> int:
        return len(self.shapes[0])

    def size(self, axis: int) -> int | None:
        """The length of an axis where it is the same under every assignment."""
        sizes = {shape[axis] for shape in self.shapes}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def floating(self) -> bool:
        return self.dtype not in (INT64, BOOL) and np.dtype(DTYPES[self.dtype]).kind not in "iu"


def _compute(turn: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """``turn`` of the first operand alone."""
    return lambda array, *_: turn(array)


@dataclass
class Case:
    """One random model and what it is run with."""

    model: onnx.ModelProto
    feeds: list[dict[str, np.ndarray]]
