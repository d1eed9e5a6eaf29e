"""What the processor of the tests does with int8."""

from __future__ import annotations

from optimizer.machine import describe_machine

_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp"}

#: Without int8 dot products, ONNX Runtime on x86 adds two products of uint8 and int8 in 16 bits,
#: which saturate: its int8 layers are less exact there, and how much depends on the spelling.
SATURATES = not _DOT_PRODUCTS & set(describe_machine()["instructions"])
