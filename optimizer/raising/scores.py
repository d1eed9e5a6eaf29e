"""Reads an attention spelled out as MatMul, Softmax, MatMul back from its Softmax node."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import by_constant, node_of, operand, operands, perm
from optimizer.raising.masks import Part, is_lowest
from optimizer.raising.shapes import Shapes

_MAX_STEPS = 12
#: Axes' order of the Transpose to [B, H, c, T] -> the order that makes [B, H, T, c] of its input.
_KEY_ORDERS: dict[tuple[int, ...], tuple[int, ...]] = {
    (0, 1, 3, 2): (0, 1, 2, 3),
    (0, 2, 3, 1): (0, 2, 1, 3),
}


@dataclass
class Scores:
    """``softmax(softcap(scale * q @ k^T) + masks)`` and how it was written.

    Attributes:
        query: [B, H, S, c].
        keys: [B, H or 1, T, c] or, with ``order`` (0, 2, 1, 3), [B, T, H, c].
        order: The axes' order that brings ``keys`` to [B, H, T, c].
        scale: The product of all constant factors.
        softcap: 0 for none.
        parts: What masks the scores.
    """

    query: ir.Value
    keys: ir.Value
    order: tuple[int, ...]
    scale: float = 1.0
    softcap: float = 0.0
    parts: list[Part] = field(default_factory=list)


def read(shapes: Shapes, softmax: ir.Node) -> Scores | str | None:
    """The scores under a Softmax; a reason if they are nearly an attention's, else None."""
    value = operand(softmax)
    shape = shapes.of(value)
    product = _product_under(value)
    if product is None:
        return None
    if shape is not None and len(shape) != 4:
        return f"scores of rank {len(shape)}, expected [batch, heads, queries, keys]"
    rank = 4 if shape is None else len(shape)
    if softmax.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return "the Softmax is not over the keys"
    parts: list[Part] = []
    scale, softcap = 1.0, 0.0
    for _ in range(_MAX_STEPS):
        node = value.producer()
        if node is product or node is None:
            break
        step = _step(node)
        if isinstance(step, str):
            return step
        if isinstance(step[1], Part):
            if scale != 1.0 or softcap:
                return "the mask is applied before the scale"
            parts.append(step[1])
        elif node.op_type == "Tanh":
            if softcap or scale <= 0:
                return "a Tanh on the scores that is no soft cap"
            scale, softcap = 1.0, scale
        else:
            scale *= step[1]
        value = step[0]
    return _finish(shapes, product, scale, softcap, parts)


def _finish(
    shapes: Shapes, product: ir.Node, scale: float, softcap: float, parts: list[Part]
) -> Scores | str:
    left, right = operands(product)
    query, factor = unscaled(left)
    scale *= factor
    keys, factor = unscaled(right)
    scale *= factor
    transpose = node_of(keys, "Transpose")
    if transpose is None:
        return "the keys are not transposed"
    order = _KEY_ORDERS.get(perm(transpose, 4))
    if order is None:
        return f"the keys are transposed by {list(perm(transpose, 4))}"
    source, factor = unscaled(operand(transpose))
    scale *= factor
    if softcap:
        # Outside of the Tanh is the cap c, inside was 1/c times the scale.
        scale *= softcap
    shape = shapes.of(query)
    if shape is None or len(shape) != 4:
        return "the rank of the queries is not known to be 4"
    return Scores(query, source, order, scale, softcap, parts)


def unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """(x, factor) with ``value = factor * x`` for constant factors."""
    factor = 1.0
    while (node := node_of(value, "Mul", "Div")) is not None:
        found = by_constant(node)
        if found is None or (node.op_type == "Div" and found[1] == 0):
            break
        value = found[0]
        factor = factor * found[1] if node.op_type == "Mul" else factor / found[1]
    return value, factor


def _step(node: ir.Node) -> tuple[ir.Value, Part | float] | str:
    """(the value below, what this node does to it)."""
    if node.op_type == "Tanh":
        return operand(node), 1.0
    if node.op_type == "Where":
        condition, chosen, rest = (operand(node, index) for index in range(3))
        if is_lowest(rest):
            return chosen, Part(condition, keeps=True)
        if is_lowest(chosen):
            return rest, Part(condition, keeps=False)
        return "the mask puts something else than the smallest number in place of scores"
    if node.op_type in ("Mul", "Div"):
        found = by_constant(node)
        if found is None or (node.op_type == "Div" and found[1] == 0):
            return "the scores are scaled by something that is not one constant"
        return found[0], float(found[1]) if node.op_type == "Mul" else 1.0 / found[1]
    if node.op_type == "Add":
        for value, mask in (operands(node), operands(node)[::-1]):
            if _product_under(value) is not None:
                return value, Part(mask)
    return f"{node.op_type} between the scores and the Softmax"


def _product_under(value: ir.Value) -> ir.Node | None:
    """The MatMul of two computed values that ``value`` is made of by masks and scales."""
    pending = [(value, _MAX_STEPS)]
    while pending:
        current, steps = pending.pop()
        node = current.producer()
        if node is None or node.domain != "" or steps == 0:
            continue
        if node.op_type == "MatMul":
            if all(graphs.constant(v) is None for v in operands(node)):
                return node
        elif node.op_type in ("Add", "Div", "Mul", "Tanh", "Where"):
            inputs = node.inputs[1:] if node.op_type == "Where" else node.inputs
            pending.extend((v, steps - 1) for v in reversed(inputs) if v is not None)
    return None


def weighted_values(softmax: ir.Node) -> tuple[ir.Node, ir.Value] | str:
    """(MatMul, values) that the probabilities of ``softmax`` go into."""
    value = softmax.outputs[0]
    guard = [use.node for use in value.uses() if use.node.op_type == "IsNaN"]
    if len(guard) == 1 and guard[0].domain == "":
        value_or_reason = _without_guard(value, guard[0])
        if isinstance(value_or_reason, str):
            return value_or_reason
        value = value_or_reason
    user = graphs.only_user(value)
    if user is None:
        return "the attention probabilities are used elsewhere"
    if user.op_type != "MatMul" or user.domain != "" or user.inputs[0] is not value:
        return "the attention probabilities are not multiplied by values"
    return user, operand(user, 1)


def _without_guard(value: ir.Value, guard: ir.Node) -> ir.Value | str:
    """The result of ``Where(IsNaN(p), 0, p)``: rows without any key become 0."""
    where = graphs.only_user(guard.outputs[0])
    if where is None or where.op_type != "Where" or operand(where, 2) is not value:
        return "the attention probabilities are checked for NaN in an unknown way"
    if graphs.scalar(operand(where, 1)) != 0 or len(value.uses()) != 2:
        return "the attention probabilities are used elsewhere"
    return where.outputs[0]
