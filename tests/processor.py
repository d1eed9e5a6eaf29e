"""What the processor of the tests does with int8."""

from __future__ import annotations

from optimizer.diagnosis.kernels import int8_kernel
from optimizer.machine import describe_cpu

_KERNEL = int8_kernel(describe_cpu())

#: Without int8 dot products, ONNX Runtime on x86 adds two products of uint8 and int8 in 16 bits,
#: which saturate: its int8 layers are less exact there, and how much depends on the spelling.
SATURATES = _KERNEL is not None and not _KERNEL.dot_product
