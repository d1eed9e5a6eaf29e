"""Which kernels ONNX Runtime takes on a processor, from the instruction sets it has.

The order is that of ONNX Runtime's own choice at run time (``core/mlas/lib/platform.cpp`` of its
version 1.31): the first line whose instructions are all there wins.
"""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.machine import Cpu


@dataclass(frozen=True)
class Kernel:
    """A family of matrix product kernels.

    Attributes:
        name: As processor makers call the instructions.
        needs: Instruction sets, as the system spells them.
        dot_product: For int8, whether four products are added up exactly in one instruction.
    """

    name: str
    needs: tuple[str, ...]
    dot_product: bool = False


_INT8 = (
    Kernel("AMX", ("amx_int8", "avx512_vnni"), dot_product=True),
    Kernel("AVX-512 VNNI", ("avx512_vnni",), dot_product=True),
    Kernel("AVX-VNNI", ("avx_vnni",), dot_product=True),
    Kernel("AVX-512", ("avx512f", "avx512bw")),
    Kernel("AVX2", ("avx2",)),
    Kernel("AVX", ("avx",)),
    Kernel("Arm int8 matrix products", ("i8mm",), dot_product=True),
    Kernel("Arm dot products", ("asimddp",), dot_product=True),
    Kernel("Arm Neon", ("asimd",)),
)
_FP32 = (
    Kernel("AVX-512", ("avx512f",)),
    Kernel("AVX2 with FMA", ("avx2", "fma")),
    Kernel("AVX", ("avx",)),
    Kernel("Arm Neon", ("asimd",)),
)


def int8_kernel(cpu: Cpu) -> Kernel | None:
    """The kernels of int8 products; None where nothing is known about the processor."""
    return _first(_INT8, cpu)


def fp32_kernel(cpu: Cpu) -> Kernel | None:
    """The kernels of float32 products; None where nothing is known about the processor."""
    return _first(_FP32, cpu)


def _first(kernels: tuple[Kernel, ...], cpu: Cpu) -> Kernel | None:
    if cpu.instructions is None:
        return None
    has = set(cpu.instructions)
    return next((kernel for kernel in kernels if has.issuperset(kernel.needs)), None)
