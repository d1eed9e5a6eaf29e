"""Nodes that the user wants to keep as they are: by name, operator, weight or place.

A pattern is a shell pattern over a node's name, its operator type, the names of what it computes
and of its constants, and the places ``layers.N``, ``layers.N.attention`` and ``layers.N.mlp`` of
transformer blocks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.blocks import find_blocks
from optimizer.errors import OptionError
from optimizer.structure import Block


def protected_nodes(model: ir.Model, patterns: Sequence[str]) -> dict[ir.Node, str]:
    """The nodes that a pattern names, each with the first that does.

    Raises:
        OptionError: A pattern names nothing.
    """
    if not patterns:
        return {}
    names = {node: set(_names(node)) for node in model.graph}
    for place, node in _places(model):
        if node in names:
            names[node].add(place)
    found: dict[ir.Node, str] = {}
    for pattern in patterns:
        matched = [n for n, known in names.items() if any(fnmatchcase(k, pattern) for k in known)]
        if not matched:
            raise OptionError(_unknown(pattern, sorted(set().union(*names.values()))))
        for node in matched:
            found.setdefault(node, pattern)
    return found


def _names(node: ir.Node) -> Iterator[str]:
    yield from (name for name in (node.name, node.op_type) if name)
    yield from (value.name for value in node.outputs if value.name)
    constants = (value for value in node.inputs if graphs.constant(value) is not None)
    yield from (value.name for value in constants if value is not None and value.name)


def _unknown(pattern: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, known, n=1)
    hint = (
        f"did you mean '{close[0]}'?"
        if close
        else "expected names or patterns of nodes, operators, weights or layers (layers.0.mlp)"
    )
    return f"option 'keep': '{pattern}' matches nothing in this model; {hint}"


def _places(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    for block in find_blocks(model).blocks:
        inside = _between(block.input, block.output)
        attention = _between(block.input, block.attention.o.output)
        for node in inside:
            yield f"layers.{block.index}", node
            part = "attention" if node in attention or _ends(block, node) else "mlp"
            yield f"layers.{block.index}.{part}", node


def _ends(block: Block, node: ir.Node) -> bool:
    """Whether ``node`` adds the attention's result to the stream before the MLP."""
    return node is block.attention_add and node is not block.mlp_add


def _between(start: ir.Value, end: ir.Value) -> set[ir.Node]:
    """The nodes through which ``start`` gets to ``end``."""
    before: set[ir.Node] = set()
    pending = [end]
    while pending:
        value = pending.pop()
        node = None if value is start else value.producer()
        if node is not None and node not in before:
            before.add(node)
            pending.extend(v for v in node.inputs if v is not None)
    found: set[ir.Node] = set()
    pending = [start]
    while pending:
        for node, _ in pending.pop().uses():
            if node in before and node not in found:
                found.add(node)
                pending.extend(node.outputs)
    return found
