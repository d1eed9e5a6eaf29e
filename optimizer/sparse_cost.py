"""When a sparse product is faster than the dense one it replaces: measured, per class of machine.

A figure is the time of ONNX Runtime's dense product divided by that of ``SparseMatMul``, on one
core, the lowest over the measured shapes (``benchmarks/sparse.py --calibrate``). Between measured
densities and numbers of tokens the lower neighbour counts; outside of them nothing is known.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "int8"]

#: From the most capable on. A machine is of the first class whose flags it has.
CLASSES: dict[str, frozenset[str]] = {
    "amx": frozenset(
        {"amx_int8", "amx_tile", "avx512_vnni", "avx512_vbmi2", "avx512bw", "avx512vl"}
    ),
    "avx512": frozenset({"avx512_vnni", "avx512_vbmi2", "avx512bw", "avx512vl", "avx512dq"}),
    "avx2": frozenset({"avx2", "fma"}),
    "neon": frozenset({"asimddp"}),
    "other": frozenset(),
}

#: Predicted gains below this are not believed.
MARGIN = 1.05


@dataclass(frozen=True)
class Figure:
    """One measurement: at least ``tokens`` rows of x, at most ``density`` of the weights stored."""

    tokens: int
    density: float
    vs_fp32: float
    vs_int8: float


@cache
def figures() -> dict[str, dict[str, tuple[Figure, ...]]]:
    """Measurements by class and precision."""
    text = resources.files("optimizer").joinpath("sparse_figures.json").read_text("utf-8")
    data = json.loads(text)["classes"]
    return {
        name: {kind: tuple(Figure(*row) for row in rows) for kind, rows in kinds.items()}
        for name, kinds in data.items()
    }


def machine_class(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The class of this machine."""
    flags: set[str] = set()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            key, _, rest = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(rest.split())
                break
    if platform.machine() in ("arm64",):  # no list of flags on macOS; all of them have it
        flags.add("asimddp")
    return next(name for name, needed in CLASSES.items() if needed <= flags)


def refusal(
    machine: str, precision: Precision, tokens: tuple[int, ...], density: float
) -> str | None:
    """None where the sparse product is faster for every number of tokens, else why not.

    An int8 product must beat ONNX Runtime's dense int8 and float32 products, a float32 one the
    float32 product.

    Args:
        machine: A class.
        precision: Of the sparse product.
        tokens: Rows of x per run.
        density: Share of the weights that is stored.
    """
    rows = figures().get(machine, {}).get(precision)
    if not rows:
        return f"{precision} was not measured on machines of class '{machine}'"
    for count in tokens:
        found = _lookup(rows, count, density)
        if found is None:
            known = max((r.density for r in rows if r.tokens <= count), default=0.0)
            return f"{density:.0%} of its weights are not zero; measured up to {known:.0%}"
        dense, gain = ("fp32", found.vs_fp32)
        if precision == "int8" and found.vs_int8 < gain:
            dense, gain = "int8", found.vs_int8
        if gain < MARGIN:
            return (
                f"with {density:.0%} of its weights not zero and {count} tokens per run it would "
                f"take {1 / gain:.2f} times as long as dense {dense}"
            )
    return None


def _lookup(rows: tuple[Figure, ...], tokens: int, density: float) -> Figure | None:
    """The worst of the measurements next to a point."""
    below = max((r.tokens for r in rows if r.tokens <= tokens), default=None)
    above = min((r.tokens for r in rows if r.tokens >= tokens), default=below)
    near = []
    for count in {below, above} - {None}:
        at_least = [r for r in rows if r.tokens == count and r.density >= density - 1e-3]
        if not at_least:
            return None
        near.append(min(at_least, key=lambda r: r.density))
    if not near:
        return None
    first = near[0]
    return Figure(
        first.tokens,
        first.density,
        min(r.vs_fp32 for r in near),
        min(r.vs_int8 for r in near),
    )
