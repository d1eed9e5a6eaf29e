"""Questions about one node or value that pattern searches ask again and again."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from optimizer import graph as graphs


def node_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The producer of ``value`` if it is one of these standard operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types and node.domain == "" else None


def operands(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Both inputs of a binary node.

    Raises:
        ValueError: One is missing, which no valid binary node allows.
    """
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        msg = f"node '{node.name}' ({node.op_type}) lacks an input"
        raise ValueError(msg)
    return first, second


def operand(node: ir.Node, index: int = 0) -> ir.Value:
    """An input that the operator requires.

    Raises:
        ValueError: It is missing.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        msg = f"node '{node.name}' ({node.op_type}) lacks input {index}"
        raise ValueError(msg)
    return value


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def other(node: ir.Node, value: ir.Value) -> ir.Value:
    """The operand of a binary node that is not ``value``."""
    first, second = operands(node)
    return second if first is value else first


def users(value: ir.Value, *op_types: str) -> Iterator[ir.Node]:
    """The standard nodes of these types that read ``value``, each once, in order of use."""
    nodes = dict.fromkeys(use.node for use in value.uses())
    return (n for n in nodes if n.op_type in op_types and n.domain == "")


def ancestors(
    value: ir.Value, stop: Collection[str] = ()
) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ...], tuple[ir.Value, ...]]:
    """What ``value`` is computed from: nodes, graph inputs, and values where the walk ended.

    Args:
        value: Where it begins.
        stop: Operators whose own inputs are not followed, but returned last.
    """
    nodes: dict[ir.Node, None] = {}
    inputs: dict[ir.Value, None] = {}
    ends: dict[ir.Value, None] = {}
    stack = [value]
    while stack:
        item = stack.pop()
        node = item.producer()
        if node is None:
            if item.is_graph_input():
                inputs[item] = None
        elif node not in nodes:
            nodes[node] = None
            values = [v for v in node.inputs if v is not None]
            if node.op_type in stop:
                ends.update(dict.fromkeys(values))
            else:
                stack.extend(values)
    return tuple(nodes), tuple(inputs), tuple(ends)


def by_constant(node: ir.Node) -> tuple[ir.Value, float | int] | None:
    """(x, number) of a binary node of x and a one-element constant.

    The constant is the second operand or, where the operator is commutative, any.
    """
    first, second = operands(node)
    pairs = [(first, second)]
    if node.op_type in ("Add", "Mul"):
        pairs.append((second, first))
    for value, constant in pairs:
        number = graphs.scalar(constant)
        if number is not None and graphs.constant(value) is None:
            return value, number
    return None


def reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The standard node of this operator that alone reads ``value``."""
    node = graphs.only_user(value)
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def dims(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a constant, without reading it."""
    tensor = graphs.constant(value)
    return None if tensor is None else tuple(int(d) for d in tensor.shape.numpy())


def perm(node: ir.Node, rank: int) -> tuple[int, ...]:
    """The axes' order of a Transpose."""
    return tuple(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
