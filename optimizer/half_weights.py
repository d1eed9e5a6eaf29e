"""Half-precision weights as float32, which remember how they are stored.

A model may keep its weights in half precision and compute in float32. Passes want to see float32
weights; what none of them has changed is stored as it was.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.data_files import note_source

HALF_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class Widened(ir.LazyTensor):
    """A half-precision constant as float32, which remembers how it is stored.

    Attributes:
        stored: The half-precision tensor.
    """

    def __init__(self, stored: ir.TensorProtocol, tensor: ir.LazyTensor) -> None:
        """Wrap ``tensor``, the float32 form of ``stored``."""
        super().__init__(tensor.raw, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
        self.stored = stored
        note_source(self, stored)


def widened(value: ir.Value) -> Widened:
    """A half-precision constant as float32, converted each time it is read.

    Raises:
        ValueError: ``value`` is not a constant.
    """
    tensor = graphs.constant(value)
    if tensor is None:
        msg = f"value '{value.name}' is not a constant"
        raise ValueError(msg)
    shape = tensor.shape.numpy()
    wide = graphs.derived(value, shape, lambda array: array.astype(np.float32), ir.DataType.FLOAT)
    return Widened(tensor, wide)


def stored_bytes(tensor: ir.TensorProtocol) -> int:
    """Bytes of a constant as it is stored."""
    return tensor.stored.nbytes if isinstance(tensor, Widened) else tensor.nbytes
