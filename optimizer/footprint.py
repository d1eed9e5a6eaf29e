"""How two models can be compared within a limit of memory: whole, in parts, or by operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optimizer import memory
from optimizer.blocks import find_blocks
from optimizer.proto import names_read
from optimizer.segments import segments

#: Memory of a session of ONNX Runtime for each byte of weights: as they are in the file, folded
#: and transposed, and as its kernels pack them.
_SESSION_FACTOR = 2.5


@dataclass(frozen=True)
class Plan:
    """How two models are run.

    Attributes:
        cuts: Names of values to cut both at; none = they are run in one piece.
        by_operator: No session of a runtime fits: numpy runs one operator after the other, with
            the weights of that operator in memory.
    """

    cuts: Sequence[str] = ()
    by_operator: bool = False


def plan(before: ir.Model, after: ir.Model, limit: int | None) -> Plan:
    """The fastest way that keeps the process below ``limit`` bytes, weights of files included."""
    models = (before, after)
    if limit is None or all(_fits(weight_bytes(m), limit) for m in models):
        return Plan()
    cuts = shared_cuts(before, after)
    if cuts and all(_fits(size, limit) for m in models for size in _part_bytes(m, cuts)):
        return Plan(cuts)
    return Plan(by_operator=True)


def shared_cuts(before: ir.Model, after: ir.Model) -> list[str]:
    """Values at which both models can be cut: the residual stream between blocks, by name.

    Blocks are found in the canonical form, which a model has either before or after lowering.
    """
    known = [
        {str(v.name) for node in model.graph for v in node.outputs} for model in (before, after)
    ]
    for model in (after, before):
        names = [str(block.input.name) for block in find_blocks(model).blocks]
        cuts = [name for name in dict.fromkeys(names) if all(name in each for each in known)]
        if cuts:
            return cuts
    return []


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return sum(t.nbytes for t in tensors if t is not None)


def _part_bytes(model: ir.Model, cuts: Sequence[str]) -> list[int]:
    held = {
        str(name): value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    read = (names_read(segment.nodes) for segment in segments(model, cuts))
    return [sum(held.get(name, 0) for name in names) for names in read]


def _fits(size: int, limit: int) -> bool:
    return memory.resident() + int(_SESSION_FACTOR * size) <= limit
