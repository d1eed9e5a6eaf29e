"""The two 16-bit number formats, in the terms that decide what they can hold.

Source: IEEE 754-2019, table 3.5, for binary16; bfloat16 is binary32 cut off after 8 of 24 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import onnx_ir as ir

#: Element types that a conversion may change. What is float64 has been chosen to be so.
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class Format:
    """One 16-bit format.

    Attributes:
        name: As users call it.
        dtype: The element type.
    """

    name: str
    dtype: ir.DataType

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return float(ml_dtypes.finfo(self.dtype.numpy()).max)

    @property
    def end(self) -> float:
        """The smallest number that rounding makes infinite: half a step beyond the largest."""
        return self.largest + self.roundoff * 2.0 ** math.floor(math.log2(self.largest))

    @property
    def tiny(self) -> float:
        """The smallest number of full precision; below, numbers lose bits."""
        return float(ml_dtypes.finfo(self.dtype.numpy()).smallest_normal)

    @property
    def smallest(self) -> float:
        """The smallest number but zero; what is at most half of it becomes zero."""
        return float(ml_dtypes.finfo(self.dtype.numpy()).smallest_subnormal)

    @property
    def roundoff(self) -> float:
        """Largest relative error of rounding a number of full precision."""
        return float(ml_dtypes.finfo(self.dtype.numpy()).eps) / 2

    @property
    def terms(self) -> int:
        """How many equal numbers a sum of this type can take up; the next one changes nothing."""
        return round(1 / self.roundoff)

    @property
    def overflows(self) -> bool:
        """Whether numbers of an ordinary float32 model can be too large for it."""
        return self.largest < float(ml_dtypes.finfo("float32").max) / 2

    @property
    def sources(self) -> frozenset[ir.DataType]:
        """The element types that become this one."""
        return FLOATS - {self.dtype}


FP16 = Format("fp16", ir.DataType.FLOAT16)
BF16 = Format("bf16", ir.DataType.BFLOAT16)
