"""When a sparse product is faster than the dense one it replaces: measured, per class of machine.

A figure is the time of a dense product divided by that of ``SparseMatMul``: of ONNX Runtime's on
one core of a CPU (``benchmarks/sparse.py --calibrate``), of cuBLAS on a GPU (``benchmarks/gpu.py
--calibrate``). Between measured sizes, densities and numbers of tokens
the lowest neighbour counts; smaller or denser weights than the measured ones are not known.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "int8"]
#: What was measured: a precision on a CPU, a layout of ``optimizer.custom_ops`` on a GPU.
Kind = Literal["fp32", "int8", "mma16", "mma8", "sp16", "sp8"]
#: By layout.
KINDS: dict[str, Kind] = {
    "n64k1": "fp32",
    "n16k4": "int8",
    "mma16": "mma16",
    "mma8": "mma8",
    "sp16": "sp16",
    "sp8": "sp8",
}

_AVX512 = ("avx512_vnni", "avx512vbmi", "avx512_vbmi2", "avx512bw", "avx512vl", "avx512dq")
#: From the most capable on. A machine is of the first class whose flags it has.
CLASSES: dict[str, frozenset[str]] = {
    "amx": frozenset({"amx_int8", "amx_tile", *_AVX512}),
    "avx512": frozenset(_AVX512),
    "avx2": frozenset({"avx2", "fma"}),
    "neon": frozenset({"asimddp"}),
    "other": frozenset(),
}
_INT8 = frozenset({"int8", "mma8", "sp8"})
#: GPUs by name: how the speeds of memory and multiprocessors compare decides.
GPUS = ("h100",)
#: ONNX Runtime's dense products use these where they are: what was measured against its AVX2
#: kernels says nothing there.
_BEYOND_AVX2 = frozenset({"avx512f", "avx_vnni"})

#: Predicted gains below this are not believed.
MARGIN = 1.05
#: Densities that differ by less are the same.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Figure:
    """One measurement: W [k, n] with a share of ``density`` stored, x [tokens, k]."""

    k: int
    n: int
    tokens: int
    density: float
    vs_float: float
    vs_int8: float


@cache
def figures() -> dict[str, dict[str, tuple[Figure, ...]]]:
    """Measurements by class and kind."""
    text = resources.files("optimizer").joinpath("sparse_figures.json").read_text("utf-8")
    data = json.loads(text)["classes"]
    return {
        name: {kind: tuple(Figure(*row) for row in rows) for kind, rows in kinds.items()}
        for name, kinds in data.items()
    }


def machine_class(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The class of this machine, or the lower one whose kernels ``OPTIMIZE_ISA`` asks for.

    "other" where our kernels are of AVX2 and the dense ones of ONNX Runtime are not.
    """
    flags: set[str] = set()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            key, _, rest = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(rest.split())
                break
    if platform.machine() in ("arm64",):  # no list of flags on macOS; all of them have it
        flags.add("asimddp")
    able = [name for name, needed in CLASSES.items() if needed <= flags]
    wanted = os.environ.get("OPTIMIZE_ISA")
    name = wanted if wanted in able else able[0]
    return "other" if name == "avx2" and flags & _BEYOND_AVX2 else name


def refusal(
    machine: str,
    kind: Kind,
    shape: tuple[int, int],
    tokens: tuple[int, ...],
    density: float,
) -> str | None:
    """None where the sparse product is faster for every number of tokens, else why not.

    An int8 product must beat the dense int8 and float products, a float one the float product, of
    ONNX Runtime (float32) on CPUs and of cuBLAS (float16) on GPUs.

    Args:
        machine: A class.
        kind: Of the sparse product.
        shape: [K, N] of the weight.
        tokens: Rows of x per run.
        density: Share of the weights that is stored.
    """
    rows = figures().get(machine, {}).get(kind)
    if not rows:
        return f"{kind} was not measured on machines of class '{machine}'"
    size = shape[0] * shape[1]
    smallest = min(row.k * row.n for row in rows)
    if size < smallest:
        return f"its weight has {size} elements; the smallest that was measured has {smallest}"
    if density > (densest := max(row.density for row in rows)) + _ROUNDING:
        return f"{density:.0%} of its weights are not zero; measured up to {densest:.0%}"
    for count in tokens:
        vs_float, vs_int8 = _worst_nearby(rows, size, count, density)
        dense, gain = ("fp16" if machine in GPUS else "fp32", vs_float)
        if kind in _INT8 and vs_int8 < gain:
            dense, gain = "int8", vs_int8
        if gain < MARGIN:
            return (
                f"with {density:.0%} of its weights not zero and {count} tokens per run it would "
                f"take {1 / gain:.2f} times as long as dense {dense}"
            )
    return None


def _worst_nearby(
    rows: tuple[Figure, ...], size: int, tokens: int, density: float
) -> tuple[float, float]:
    """The lowest gains over float and int8 of the measurements around a point.

    Those of the next smaller and larger sizes and numbers of tokens, at the next higher density:
    fewer stored weights are never slower.
    """
    at_least = min(row.density for row in rows if row.density >= density - _ROUNDING)
    sizes = _neighbours({row.k * row.n for row in rows}, size)
    counts = _neighbours({row.tokens for row in rows}, tokens)
    near = [
        row
        for row in rows
        if row.density == at_least and row.k * row.n in sizes and row.tokens in counts
    ]
    return min(row.vs_float for row in near), min(row.vs_int8 for row in near)


def _neighbours(values: set[int], value: int) -> set[int]:
    """The largest that is not above and the smallest that is not below."""
    below = [v for v in values if v <= value]
    above = [v for v in values if v >= value]
    return {*([max(below)] if below else []), *([min(above)] if above else [])}
