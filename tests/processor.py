"""What the processor of the tests does with int8."""

from __future__ import annotations

from optimizer.diagnosis.kernels import int8_kernel
from optimizer.machine import describe_cpu
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner

_KERNEL = int8_kernel(describe_cpu())

#: Without int8 dot products, ONNX Runtime on x86 adds two products of uint8 and int8 in 16 bits,
#: which saturate: its int8 layers are less exact there, and how much depends on the spelling.
SATURATES = _KERNEL is not None and not _KERNEL.dot_product

#: The largest int8 weight of which no two products with uint8 saturate: 2 * 255 * 64 < 2 ** 15.
TOP = 64 if SATURATES else 127

#: Runs models whose int8 weights exceed that, as they are written.
Int8Runner = ReferenceRunner if SATURATES else OrtRunner
