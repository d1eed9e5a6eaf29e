"""Reads an attention spelled out as MatMul, Softmax, MatMul back from its Softmax node."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import by_constant, dims, node_of, operand, operands, perm, reader, users
from optimizer.raising.masks import Part, is_lowest
from optimizer.raising.shapes import Shapes
from optimizer.special_parts import disentangled, products_under

_MAX_STEPS = 12
#: Axes' order of the Transpose to [B, H, c, T] -> the order that makes [B, H, T, c] of its input.
_KEY_ORDERS: dict[tuple[int, ...], tuple[int, ...]] = {
    (0, 1, 3, 2): (0, 1, 2, 3),
    (0, 2, 3, 1): (0, 2, 1, 3),
}


_SWAP_LAST = (0, 1, 3, 2)


@dataclass(frozen=True)
class Side:
    """Queries or keys of a product of scores.

    Attributes:
        value: [B, H, S, c] or, with ``order`` (0, 2, 1, 3), [B, S, H, c].
        order: The axes' order that brings ``value`` to [B, H, S, c].
    """

    value: ir.Value
    order: tuple[int, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Scores:
    """``softmax(softcap(scale * q @ k^T) + masks)`` and how it was written.

    Attributes:
        scale: The product of all constant factors.
        softcap: 0 for none.
        parts: What masks the scores.
        product: ``q @ k^T`` (or, without parts, ``k @ q^T``), before everything else.
        result: The probabilities [B, H, S, T].
        precision: What the scores are cast to for the Softmax; None: nothing.
    """

    query: Side
    keys: Side
    scale: float
    softcap: float
    parts: tuple[Part, ...]
    product: ir.Value
    result: ir.Value
    precision: ir.DataType | None = None


def read(shapes: Shapes, softmax: ir.Node) -> Scores | str | None:
    """The scores under a Softmax; a reason if they are nearly an attention's, else None."""
    value = operand(softmax)
    product = _product_under(value)
    if product is None:
        return None
    shape = shapes.of(value)
    if shape is not None and len(shape) != 4:
        return f"scores of rank {len(shape)}, expected [batch, heads, queries, keys]"
    turned = _turned_back(softmax)
    if turned is None and softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return "the Softmax is not over the keys"
    found = _walk(value, product)
    if isinstance(found, str):
        return found
    scale, softcap, parts, precision = found
    products = 1 + sum(len(products_under(part.value)) for part in parts)
    if products > 1:
        return disentangled(products)
    if turned is not None and parts:
        return "a mask on scores [batch, heads, keys, queries]"
    sides = _sides(shapes, product, turned=turned is not None)
    if isinstance(sides, str):
        return sides
    query, keys, factor = sides
    # Outside of the Tanh is the cap c, inside was 1/c times the scale.
    scale *= factor * (softcap or 1.0)
    result, of = turned or softmax.outputs[0], product.outputs[0]
    return Scores(query, keys, scale, softcap, tuple(parts), of, result, precision)


def _turned_back(softmax: ir.Node) -> ir.Value | None:
    """The Transpose of a Softmax over the keys of ``k @ q^T``, as TensorFlow writes it."""
    if softmax.attributes.get_int("axis", -1) not in (2, -2):
        return None
    user = reader(softmax.outputs[0], "Transpose")
    if user is None:
        return None
    return user.outputs[0] if perm(user, 4) == _SWAP_LAST else None


def _walk(
    value: ir.Value, product: ir.Node
) -> tuple[float, float, list[Part], ir.DataType | None] | str:
    """(scale inside of the soft cap, soft cap, masks, precision) from Softmax up to the product."""
    parts: list[Part] = []
    scale, softcap = 1.0, 0.0
    precision: ir.DataType | None = None
    for _ in range(_MAX_STEPS):
        node = value.producer()
        if node is product or node is None:
            break
        if node.op_type == "Cast":
            if precision is not None or not _widens(node):
                return "the scores are cast between the product and the Softmax"
            if scale != 1.0 or softcap or any(part.adds for part in parts):
                return "the scores are cast to another type before they are masked or scaled"
            precision, value = value.dtype, operand(node)
            continue
        step = _step(node)
        if isinstance(step, str):
            return step
        value, effect = step
        if isinstance(effect, Part):
            if scale != 1.0 or softcap:
                return "the mask is applied before the scale"
            parts.append(effect)
        elif node.op_type == "Tanh":
            if softcap or scale <= 0:
                return "a Tanh on the scores that is no soft cap"
            scale, softcap = 1.0, scale
        else:
            scale *= effect
    return scale, softcap, parts, precision


def _widens(cast: ir.Node) -> bool:
    """Whether a Cast goes from one floating-point type to a wider one."""
    before, after = operand(cast).dtype, cast.outputs[0].dtype
    if before is None or after is None:
        return False
    floats = before.is_floating_point() and after.is_floating_point()
    return floats and after.bitwidth > before.bitwidth


def _sides(shapes: Shapes, product: ir.Node, *, turned: bool) -> tuple[Side, Side, float] | str:
    """(queries, keys, product of the factors) of ``q @ k^T``, or of ``k @ q^T`` if ``turned``."""
    first, second = operands(product)
    left, scale = unscaled(first)
    right, factor = unscaled(second)
    scale *= factor
    transpose = node_of(right, "Transpose")
    if transpose is None:
        return "the keys are not transposed"
    order = _KEY_ORDERS.get(perm(transpose, 4))
    if order is None:
        return f"the keys are transposed by {list(perm(transpose, 4))}"
    right, factor = unscaled(operand(transpose))
    sides = Side(left), Side(right, order)
    query, keys = sides[::-1] if turned else sides
    rank = shapes.of(query.value)
    if rank is None or len(rank) != 4:
        return "the rank of the queries is not known to be 4"
    return query, keys, scale * factor


def unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """(x, factor) with ``value = factor * x`` for constant factors."""
    factor = 1.0
    while (node := node_of(value, "Mul", "Div")) is not None:
        found = by_constant(node)
        if found is None or (node.op_type == "Div" and found[1] == 0) or _widens_rank(node):
            break
        value = found[0]
        factor = factor * found[1] if node.op_type == "Mul" else factor / found[1]
    return value, factor


def _widens_rank(node: ir.Node) -> bool:
    """Whether a constant may have more axes than the other operand, and add them to the result."""
    ranks = [len(dims(v) or ()) for v in operands(node)]
    known = [len(v.shape) for v in operands(node) if dims(v) is None and v.shape is not None]
    return max(ranks) > min(known, default=1)


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
        elif node.op_type in ("Add", "Cast", "Div", "Mul", "Tanh", "Where"):
            inputs = node.inputs[1:] if node.op_type == "Where" else node.inputs
            pending.extend((v, steps - 1) for v in reversed(inputs) if v is not None)
    return None


@dataclass(frozen=True)
class Weighted:
    """Where the probabilities go.

    Attributes:
        product: The MatMul of probabilities and values.
        values: [B, H, T, c].
        probabilities: [B, H, S, T].
        read_elsewhere: Whether anything else reads the probabilities.
    """

    product: ir.Node
    values: ir.Value
    probabilities: ir.Value
    read_elsewhere: bool


def weighted_values(value: ir.Value, narrow: ir.DataType | None = None) -> Weighted | str:
    """The MatMul that the probabilities ``value`` go into.

    Args:
        value: The result of the Softmax.
        narrow: What it must be cast to first, None for nothing.
    """
    guard = [use.node for use in value.uses() if use.node.op_type == "IsNaN"]
    if len(guard) == 1 and guard[0].domain == "":
        guarded = _without_guard(value, guard[0])
        if isinstance(guarded, str):
            return guarded
        value = guarded
    if narrow is not None:
        cast = graphs.only_user(value)
        if cast is None or cast.op_type != "Cast" or cast.outputs[0].dtype is not narrow:
            return f"the attention probabilities are not cast back to {narrow.name}"
        value = cast.outputs[0]
    products = [node for node in users(value, "MatMul") if node.inputs[0] is value]
    if len(products) != 1:
        return "the attention probabilities are not multiplied by values"
    values = operand(products[0], 1)
    elsewhere = len(value.uses()) > 1 or value.is_graph_output()
    return Weighted(products[0], values, value, elsewhere)


def _without_guard(value: ir.Value, guard: ir.Node) -> ir.Value | str:
    """The result of ``Where(IsNaN(p), 0, p)``: rows without any key become 0."""
    where = graphs.only_user(guard.outputs[0])
    if where is None or where.op_type != "Where" or operand(where, 2) is not value:
        return "the attention probabilities are checked for NaN in an unknown way"
    if graphs.scalar(operand(where, 1)) != 0 or len(value.uses()) != 2 or value.is_graph_output():
        return "the attention probabilities are used elsewhere"
    return where.outputs[0]
